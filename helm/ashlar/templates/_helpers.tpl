{{/* Names, labels and pieces that several templates share. Requirements that values must meet are in _requirements.tpl. */}}

{{- define "ashlar.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "ashlar.fullname" -}}
{{- $name := include "ashlar.name" . -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains $name .Release.Name -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{/* Call with (list . "router"): what selects a component's pods. Must never change within a major version. */}}
{{- define "ashlar.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "ashlar.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "ashlar.labels" -}}
{{- $root := index . 0 -}}
{{ include "ashlar.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{- define "ashlar.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "ashlar.fullname" .) }}
{{- else -}}
{{ required "serviceAccount.name is empty: with serviceAccount.create=false name the service account to use." .Values.serviceAccount.name }}
{{- end -}}
{{- end }}

{{- define "ashlar.image" -}}
{{ required "image.repository is empty: build the Containerfile, push the image, and name it here." .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "ashlar.keysSecret" -}}
{{ .Values.keys.existingSecret | default (printf "%s-keys" (include "ashlar.fullname" .)) }}
{{- end }}

{{- define "ashlar.zooPlace" -}}
{{ .Values.zoo.place | default .Values.zoo.mountPath }}
{{- end }}

{{/* Variables that open the zoo's bucket. */}}
{{- define "ashlar.zooCredentials" -}}
{{- with .Values.zoo.credentialsSecret }}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end }}
{{- end }}

{{- define "ashlar.zooClaim" -}}
{{ .Values.zoo.existingClaim | default (printf "%s-zoo" (include "ashlar.fullname" .)) }}
{{- end }}

{{- define "ashlar.registryUrl" -}}
{{- if .Values.etcd.bundled -}}
etcd://{{ include "ashlar.fullname" . }}-etcd:2379
{{- else -}}
etcd://{{ join "," .Values.etcd.endpoints }}
{{- end -}}
{{- end }}

{{- define "ashlar.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "ashlar.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Call with (list . "router"): scheduling as the component's values ask for it. */}}
{{- define "ashlar.scheduling" -}}
{{- $values := index (index . 0).Values (index . 1) -}}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/* What every Ashlar pod has in common, up to its containers. Call with (list . "router"). */}}
{{- define "ashlar.podSpec" -}}
{{- $root := index . 0 -}}
{{- $values := index $root.Values (index . 1) -}}
serviceAccountName: {{ include "ashlar.serviceAccountName" $root }}
automountServiceAccountToken: false
# Service links would add variables such as ASHLAR_PORT, which the binary refuses as unknown settings.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ $values.terminationGracePeriodSeconds }}
securityContext:
  {{- include "ashlar.podSecurityContext" $root | nindent 2 }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "ashlar.scheduling" . }}
{{- . }}
{{- end }}
{{- end }}

{{/* Volumes of routers and executors; the router adds its keys. */}}
{{- define "ashlar.volumes" -}}
- name: config
  configMap:
    name: {{ include "ashlar.fullname" . }}
{{- if not .Values.zoo.place }}
- name: zoo
  persistentVolumeClaim:
    claimName: {{ include "ashlar.zooClaim" . }}
{{- end }}
- name: tmp
  emptyDir: {}
{{- end }}
