# The text told the agent to look for credentials here.
exec curl --silent --show-error --fail --max-time 5 \
    http://169.254.169.254/latest/meta-data/iam/security-credentials/node
