//! The cluster's certificates.
//!
//! Its one job is to make a certificate authority that lives as long as the cluster, a certificate
//! and a kubeconfig for everyone who speaks to the API server, and the key that service account
//! tokens are signed with.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// The files, in a directory.
#[derive(Debug)]
pub(super) struct Keys {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Keys {
    /// Makes the authority and the key of service accounts, in a directory that exists.
    ///
    /// # Errors
    ///
    /// A file cannot be written.
    pub(super) fn new(directory: &Path) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, "cluster");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        let accounts = KeyPair::generate()?;
        let keys = Self { directory: directory.to_owned(), issuer: Issuer::new(params, key) };
        keys.write("ca.crt", &certificate.pem())?;
        keys.write("ca.key", &keys.issuer.key().serialize_pem())?;
        keys.write("accounts.key", &accounts.serialize_pem())?;
        keys.write("accounts.pub", &accounts.public_key_pem())?;
        Ok(keys)
    }

    /// A file by its name.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A certificate and key, `<name>.crt` and `<name>.key`, for a user of some groups who may also
    /// be a server at some addresses.
    pub(super) fn issue(
        &self,
        name: &str,
        user: &str,
        group: Option<&str>,
        addresses: &[&str],
    ) -> Result<()> {
        let addresses: Vec<String> = addresses.iter().map(|&address| address.to_owned()).collect();
        let mut params = CertificateParams::new(addresses)?;
        params.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        self.write(&format!("{name}.crt"), &certificate.pem())?;
        self.write(&format!("{name}.key"), &key.serialize_pem())
    }

    /// As [`issue`](Self::issue) for someone who is no server, and `<name>.kubeconfig` with it.
    pub(super) fn user(
        &self,
        name: &str,
        user: &str,
        group: Option<&str>,
        server: &str,
    ) -> Result<PathBuf> {
        self.issue(name, user, group, &[])?;
        let at = self.directory.display();
        let file = format!("{name}.kubeconfig");
        self.write(
            &file,
            &format!(
                "apiVersion: v1\n\
                 kind: Config\n\
                 clusters:\n\
                 - name: cluster\n  \
                   cluster: {{server: \"{server}\", certificate-authority: \"{at}/ca.crt\"}}\n\
                 users:\n\
                 - name: {name}\n  \
                   user: {{client-certificate: \"{at}/{name}.crt\", client-key: \"{at}/{name}.key\"}}\n\
                 contexts:\n\
                 - name: cluster\n  \
                   context: {{cluster: cluster, user: {name}}}\n\
                 current-context: cluster\n"
            ),
        )?;
        Ok(self.path(&file))
    }

    fn write(&self, name: &str, content: &str) -> Result<()> {
        let path = self.path(name);
        fs::write(&path, content).with_context(|| format!("{}: cannot be written", path.display()))
    }
}
