{{/* What the schema cannot say: requirements across values, each failing with a sentence that says what to do. */}}
{{- define "ashlar.requirements" -}}
{{- $given := 0 -}}
{{- if .Values.keys.existingSecret }}{{ $given = add1 $given }}{{ end -}}
{{- if .Values.keys.content }}{{ $given = add1 $given }}{{ end -}}
{{- if .Values.keys.anonymous }}{{ $given = add1 $given }}{{ end -}}
{{- if eq $given 0 }}
{{- fail "No keys: set keys.existingSecret to a Secret with the keys file (or keys.content to the file itself), or say keys.anonymous=true to serve everyone." }}
{{- end }}
{{- if gt $given 1 }}
{{- fail "keys.existingSecret, keys.content and keys.anonymous exclude each other: set one of them." }}
{{- end }}
{{- if and (not .Values.etcd.bundled) (not .Values.etcd.endpoints) }}
{{- fail "No registry: with etcd.bundled=false set etcd.endpoints to your etcd, such as [etcd-0.etcd:2379]." }}
{{- end }}
{{- if and .Values.etcd.bundled .Values.etcd.endpoints }}
{{- fail "etcd.endpoints is set while etcd.bundled is true: set etcd.bundled=false to use your own etcd, or drop the endpoints." }}
{{- end }}
{{- if and .Values.zoo.place .Values.zoo.existingClaim }}
{{- fail "zoo.place and zoo.existingClaim exclude each other: the zoo is in the bucket or on the volume." }}
{{- end }}
{{- if and .Values.zoo.credentialsSecret (not .Values.zoo.place) }}
{{- fail "zoo.credentialsSecret opens a bucket, and zoo.place names none: set zoo.place to s3://BUCKET[/PREFIX], or drop the Secret." }}
{{- end }}
{{- if and (not .Values.zoo.place) (not .Values.zoo.existingClaim) (not .Values.zoo.singleNode) (not (has "ReadWriteMany" .Values.zoo.accessModes)) }}
{{- fail "zoo.accessModes lacks ReadWriteMany: routers and executors on different nodes could not share the zoo. Use such a storage class, or say zoo.singleNode=true if all pods run on one node." }}
{{- end }}
{{- with .Values.executor.autoscaling }}
{{- if and .enabled (lt (int .maxReplicas) (int .minReplicas)) }}
{{- fail (printf "executor.autoscaling.maxReplicas (%d) is below minReplicas (%d)." (int .maxReplicas) (int .minReplicas)) }}
{{- end }}
{{- end }}
{{- range $component := list "router" "executor" }}
{{- $values := index $.Values $component }}
{{- if ge (int $values.drainDelaySeconds) (int $values.terminationGracePeriodSeconds) }}
{{- fail (printf "%s.terminationGracePeriodSeconds (%d) leaves no time to drain after drainDelaySeconds (%d)." $component (int $values.terminationGracePeriodSeconds) (int $values.drainDelaySeconds)) }}
{{- end }}
{{- end }}
{{- end }}
