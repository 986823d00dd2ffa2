{{- define "agentguard.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "agentguard.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "agentguard.labels" -}}
{{ include "agentguard.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "agentguard.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "agentguard.name" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is needed when serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "agentguard.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The configuration file. What the chart mounts stands last, so that it is what counts. */}}
{{- define "agentguard.config" -}}
{{- $metrics := dict "listen" (printf "%s:%d" .Values.metrics.address (int .Values.metrics.port)) -}}
{{- $containers := dict
      "runtimes" (list .Values.runtimeSocket)
      "exempt_namespaces" (include "agentguard.exempt" . | fromJsonArray) -}}
{{- $own := dict
      "trust_domain" .Values.trustDomain
      "mode" .Values.mode
      "require" .Values.require
      "cgroup_root" nil
      "pin_directory" "/sys/fs/bpf/agentguard"
      "state_directory" "/var/lib/agentguard"
      "runtime_directory" "/run/agentguard"
      "manifests_directory" "/etc/agentguard/manifests"
      "kubernetes" (dict "access" "in-cluster" "events" .Values.podEvents)
      "containers" $containers
      "metrics" $metrics -}}
{{- toYaml (mustMergeOverwrite (deepCopy .Values.config) $own) -}}
{{- end -}}

{{/* The namespaces that are exempt. */}}
{{- define "agentguard.exempt" -}}
{{- append .Values.exemptNamespaces .Release.Namespace | uniq | toJson -}}
{{- end -}}

{{/* Where the node has the daemon's socket. */}}
{{- define "agentguard.socket" -}}
{{ .Values.hostPaths.runtime }}/{{ base (dig "api" "socket" "agentguard.sock" .Values.config) }}
{{- end -}}

{{/* What the daemon may do, and what removes it from a node. */}}
{{- define "agentguard.security" -}}
runAsUser: 0
runAsGroup: 0
readOnlyRootFilesystem: true
# Not to be refused where SYS_ADMIN is given. Nothing in the image is setuid.
allowPrivilegeEscalation: true
capabilities:
  drop: [ALL]
  add: {{- toYaml .Values.capabilities | nindent 4 }}
seccompProfile: {{- toYaml .Values.seccompProfile | nindent 2 }}
{{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}
# The usual profile forbids looking into other containers' files and file systems.
appArmorProfile: {type: Unconfined}
{{- end }}
{{- with .Values.seLinuxOptions }}
seLinuxOptions: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What both see of the node. */}}
{{- define "agentguard.mounts" -}}
- {name: config, mountPath: /etc/agentguard/config, readOnly: true}
{{- if .Values.manifests }}
- {name: manifests, mountPath: /etc/agentguard/manifests, readOnly: true}
{{- end }}
- {name: bpf, mountPath: /sys/fs/bpf, mountPropagation: HostToContainer}
- {name: cgroup, mountPath: /sys/fs/cgroup, mountPropagation: HostToContainer}
- {name: container-runtime, mountPath: {{ dir .Values.runtimeSocket }}}
- {name: nri, mountPath: {{ .Values.hostPaths.nri }}}
- {name: state, mountPath: /var/lib/agentguard}
- {name: runtime, mountPath: /run/agentguard}
- {name: log, mountPath: /var/log/agentguard}
{{- end }}

{{/* What puts the runtime's hook on a node, and takes it away, may do. */}}
{{- define "agentguard.installer" -}}
runAsUser: 0
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{/* Where it does so. */}}
{{- define "agentguard.hook" -}}
{{- if eq .Values.hook.runtime "cri-o" -}}
- {name: hooks, mountPath: /host/hooks}
{{ end -}}
- {name: programs, mountPath: /host/bin}
{{- end }}
