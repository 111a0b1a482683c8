{{/* Names. The chart's version is in no selector: an upgrade could not change it. */}}
{{- define "sagellm.fullname" -}}
{{- $name := ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Called with (dict "root" $ "part" "router"), as the ones for labels and metadata. */}}
{{- define "sagellm.name" -}}
{{ include "sagellm.fullname" .root }}-{{ .part }}
{{- end }}

{{- define "sagellm.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .part }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{- define "sagellm.labels" -}}
{{ include "sagellm.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "sagellm.metadata" -}}
name: {{ include "sagellm.name" . }}
namespace: {{ .root.Release.Namespace }}
labels: {{- include "sagellm.labels" . | nindent 2 }}
{{- end }}

{{/* JSON of all ports: SagePorts of sagellm_common/core/ports.py, where each pod has the ports of the first of its kind. */}}
{{- define "sagellm.ports" -}}
{{- $base := int .Values.portBase -}}
{{- dict "gateway" $base "router" (add $base 1) "routerSession" (add $base 750) "routerMetrics" (add $base 500)
  "worker" (add $base 10) "workerData" (add $base 11) "workerSession" (add $base 751) "workerMetrics" (add $base 501)
  "etcd" 2379 "etcdPeers" 2380 | toJson -}}
{{- end }}

{{- define "sagellm.routerAddress" -}}
{{ include "sagellm.name" (dict "root" . "part" "router") }}.{{ .Release.Namespace }}.svc:{{ (include "sagellm.ports" . | fromJson).router }}
{{- end }}

{{/* JSON list of etcd's host:port; empty when the router keeps the topology. */}}
{{- define "sagellm.etcdEndpoints" -}}
{{- $endpoints := .Values.etcd.endpoints -}}
{{- if .Values.etcd.replicas -}}
{{- $name := include "sagellm.name" (dict "root" . "part" "etcd") -}}
{{- $endpoints = list -}}
{{- range until (int .Values.etcd.replicas) -}}
{{- $endpoints = append $endpoints (printf "%s-%d.%s.%s.svc:2379" $name . $name $.Release.Namespace) -}}
{{- end -}}
{{- end -}}
{{- toJson $endpoints -}}
{{- end }}

{{/* The services' configuration: what values say under `config`, and what only the chart knows. */}}
{{- define "sagellm.config" -}}
{{- $etcd := include "sagellm.etcdEndpoints" . | fromJsonArray -}}
{{- $topology := dict "backend" "embedded" -}}
{{- if $etcd }}{{ $topology = dict "backend" "etcd" "endpoints" $etcd }}{{ end -}}
{{- $store := dict "enabled" (gt (int .Values.kvStore.replicas) 0) -}}
{{- if .Values.kvStore.disk.size }}{{ $_ := set $store "disk" (dict "path" "/var/lib/sagellm/kv") }}{{ end -}}
{{- $known := dict
  "cluster" (dict "name" (printf "%s-%s" .Release.Namespace (include "sagellm.fullname" .)) "port_base" (int .Values.portBase))
  "model" (dict "path" .Values.model.path "name" .Values.model.name)
  "topology" $topology
  "router" (dict "address" (include "sagellm.routerAddress" .))
  "kv_store" $store -}}
{{- with .Values.autoscaler }}
{{- if .enabled }}
{{- $name := include "sagellm.fullname" $ -}}
{{- $_ := set $known "autoscaler" (dict
  "mode" (ternary "act" "dry-run" (eq .scaledBy "autoscaler"))
  "min_prefill" (index .bounds.prefill 0) "max_prefill" (index .bounds.prefill 1)
  "min_decode" (index .bounds.decode 0) "max_decode" (index .bounds.decode 1)
  "routers" (list (printf "%s-router-pods.%s.svc:%v" $name $.Release.Namespace (include "sagellm.ports" $ | fromJson).routerMetrics))
  "namespace" $.Release.Namespace
  "prefill_target" (printf "deployment/%s-prefill" $name) "decode_target" (printf "deployment/%s-decode" $name)
  "lease" (printf "%s-autoscaler" $name)) -}}
{{- end }}
{{- end }}
{{- mustMergeOverwrite (deepCopy .Values.config) $known | toYaml -}}
{{- end }}

{{/* What no schema can say. */}}
{{- define "sagellm.check" -}}
{{- if not .Values.model.path }}
{{- fail "model.path is empty: set it to the directory of a checkpoint as containers see it, such as /models/Qwen2-7B-Instruct, and model.volume to the volume that has it" }}
{{- end }}
{{- if and .Values.etcd.replicas .Values.etcd.endpoints }}
{{- fail "etcd.endpoints name an etcd of yours, and etcd.replicas starts another: set etcd.replicas to 0, or leave endpoints out" }}
{{- end }}
{{- if and (gt (int .Values.router.replicas) 1) (eq (include "sagellm.etcdEndpoints" .) "[]") }}
{{- fail "router.replicas above 1 needs etcd, for each router would keep a topology of its own: set etcd.replicas or etcd.endpoints" }}
{{- end }}
{{- if .Values.autoscaler.enabled }}
{{- range $target := list "ttft_target_ms" "tpot_target_ms" }}
{{- if not (dig "router" $target 0 $.Values.config) }}
{{- fail (printf "config.router.%s is not set: the autoscaler needs it to tell what is enough, such as 1000 and 50" $target) }}
{{- end }}
{{- end }}
{{- if and (eq (dig "router" "strategy" "fifo" .Values.config) "fifo") (not (dig "router" "cost_model_path" "" .Values.config)) }}
{{- fail "config.router.strategy is fifo, which learns no costs, and the autoscaler plans by them: set it to hybrid or slo_aware" }}
{{- end }}
{{- end }}
{{- if and (gt (int .Values.etcd.replicas) 1) (not .Values.etcd.storage) }}
{{- fail "etcd.storage is empty: a member of several that comes back without its data is not taken; set a size, or etcd.replicas to 1" }}
{{- end }}
{{- end }}

{{- define "sagellm.image" -}}
{{- with .root.Values.image -}}
{{ $.values.image | default (printf "%s:%s" .repository (.tag | default $.root.Chart.AppVersion)) }}
{{- end -}}
{{- end }}

{{/* The pod of one of our services. Called with root, part, values, container (YAML of what differs) and volumes (YAML).
     Worker ids are pod names. Each pod binds its own address, for that is what it tells the others. */}}
{{- define "sagellm.pod" -}}
metadata:
  labels: {{- include "sagellm.selector" . | nindent 4 }}
  annotations:
    checksum/config: {{ include "sagellm.config" .root | sha256sum }}
    {{- with .values.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "sagellm.name" . }}
  automountServiceAccountToken: {{ eq .part "autoscaler" }}
  enableServiceLinks: false # SAGELLM_… variables of Kubernetes' own would be taken for settings
  terminationGracePeriodSeconds: {{ add (int .values.drainSeconds) 20 }} # preStop, the drain, and what it takes to end
  {{- include "sagellm.scheduling" . | nindent 2 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  containers:
    - name: {{ .part }}
      image: {{ include "sagellm.image" . | quote }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      {{- .container | nindent 6 }}
      env:
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        {{- if has .part (list "router" "gateway" "autoscaler") }}
        - {name: SAGELLM_CLUSTER__HOST, value: "0.0.0.0"} # who reaches them knows their Service
        {{- else }}
        - {name: SAGELLM_CLUSTER__HOST, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        {{- end }}
        - {name: SAGELLM_CLUSTER__DRAIN_GRACE_S, value: {{ .values.drainSeconds | quote }}}
        - {name: HOME, value: /tmp}
        {{- if and (eq .part "gateway") .values.apiKeysSecret }}
        - name: SAGELLM_GATEWAY__API_KEYS
          valueFrom: {secretKeyRef: {name: {{ .values.apiKeysSecret | quote }}, key: api_keys}}
        {{- end }}
        {{- with .values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources: {{- toYaml .values.resources | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]{{ with .values.addCapabilities }}, add: {{ toJson . }}{{ end }}}
      volumeMounts:
        - {name: config, mountPath: /etc/sagellm, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        {{- if has .part (list "prefill" "decode") }}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- end }}
        {{- if and .root.Values.model.volume (has .part (list "prefill" "decode" "gateway")) }}
        - {name: model, mountPath: {{ .root.Values.model.mountPath | quote }}, readOnly: true}
        {{- end }}
        {{- if and (eq .part "kv-store") .values.disk.size }}
        - {name: kv, mountPath: /var/lib/sagellm}
        {{- end }}
  volumes:
    - {name: config, configMap: {name: {{ include "sagellm.fullname" .root }}}}
    - {name: tmp, emptyDir: {}}
    {{- if has .part (list "prefill" "decode") }}
    - {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: {{ .root.Values.sharedMemory | quote }}}}
    {{- end }}
    {{- if and .root.Values.model.volume (has .part (list "prefill" "decode" "gateway")) }}
    - name: model
      {{- toYaml .root.Values.model.volume | nindent 6 }}
    {{- end }}
{{- end }}

{{- define "sagellm.scheduling" -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - {{- toYaml . | nindent 4 }}
    labelSelector:
      matchLabels: {{- include "sagellm.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}
{{- end }}

{{/* gRPC health as kubelet asks for it. Called with port and startSeconds. A worker that drains is not ready, but alive. */}}
{{- define "sagellm.grpcProbes" -}}
startupProbe:
  grpc: {port: {{ .port }}}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: {{ div (add (int .startSeconds) 1) 2 }}
readinessProbe:
  grpc: {port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  grpc: {port: {{ .port }}}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
{{- end }}

{{/* Of a worker; called with root, part, values. */}}
{{- define "sagellm.worker" -}}
{{- $ports := include "sagellm.ports" .root | fromJson -}}
{{- if eq .part "kv-store" }}
command: [python, -m, services.kv_store]
{{- else }}
command: [python, -m, services.worker]
{{- end }}
args:
  {{- if ne .part "kv-store" }}
  - --role={{ .part }}
  {{- end }}
  - --config=/etc/sagellm/config.yaml
  - --id=$(POD_NAME)
  - --port={{ $ports.worker }}
  - --data-port={{ $ports.workerData }}
  {{- if ne .part "kv-store" }}
  - --session-port={{ $ports.workerSession }}
  {{- end }}
  - --metrics-port={{ $ports.workerMetrics }}
ports:
  - {name: grpc, containerPort: {{ $ports.worker }}}
  - {name: kv, containerPort: {{ $ports.workerData }}}
  {{- if ne .part "kv-store" }}
  - {name: session, containerPort: {{ $ports.workerSession }}}
  {{- end }}
  - {name: metrics, containerPort: {{ $ports.workerMetrics }}}
{{ include "sagellm.grpcProbes" (dict "port" $ports.worker "startSeconds" (.values.startSeconds | default 60)) }}
lifecycle:
  preStop:
    exec:
      command: [python, /etc/sagellm/drain.py, --port={{ $ports.worker }}, --grace-s={{ .values.drainSeconds }}]
{{- end }}
