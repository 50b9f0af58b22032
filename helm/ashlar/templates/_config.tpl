{{/* ashlar.toml, read by routers and executors alike. A zero or an empty text leaves the binary's own default. */}}
{{- define "ashlar.config" -}}
[registry]
url = {{ include "ashlar.registryUrl" . | quote }}

[zoo]
root = {{ include "ashlar.zooPlace" . | quote }}
{{- if and .Values.zoo.place .Values.zoo.cacheBytes }}
# Executors' alone: routers read no tensors.
cache = "/var/cache/ashlar"
cache_bytes = {{ int64 .Values.zoo.cacheBytes }}
{{- end }}

[router]
listen = "0.0.0.0:8080"
{{- if not .Values.keys.anonymous }}
keys_file = "/etc/ashlar/keys/{{ .Values.keys.secretKey }}"
{{- end }}

[executor]
listen = "0.0.0.0:8090"
metrics_listen = "0.0.0.0:8091"
device = {{ .Values.executor.device | quote }}
{{- range $key, $value := dict "threads" .Values.executor.threads "kv_bytes" .Values.executor.kvBytes "memory_bytes" .Values.executor.memoryBytes "page_tokens" .Values.executor.pageTokens "step_tokens_max" .Values.executor.stepTokensMax "sequences_max" .Values.executor.sequencesMax }}
{{- if $value }}
{{ $key }} = {{ int64 $value }}
{{- end }}
{{- end }}
{{- range $key, $value := dict "isa" .Values.executor.isa "kv_format" .Values.executor.kvFormat "bf16_compute" .Values.executor.bf16Compute }}
{{- with $value }}
{{ $key }} = {{ . | quote }}
{{- end }}
{{- end }}

[log]
filter = {{ .Values.log.filter | quote }}
format = {{ .Values.log.format | quote }}
{{- with .Values.log.otlpEndpoint }}
otlp_endpoint = {{ . | quote }}
{{- end }}
{{- with .Values.extraConfig }}

{{ . | trim }}
{{- end }}
{{- end }}
