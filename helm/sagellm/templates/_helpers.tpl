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

{{/* JSON list of the deployments of prefill and decode workers: of `model`, then of each of `models`, whose values lie over
     those of the role. `part` names their objects; `model` is empty for the first. */}}
{{- define "sagellm.pools" -}}
{{- $pools := list -}}
{{- range $role := list "prefill" "decode" -}}
{{- $pools = append $pools (dict "part" $role "role" $role "model" "" "values" (get $.Values $role)) -}}
{{- range $key, $model := $.Values.models -}}
{{- $values := mustMergeOverwrite (deepCopy (get $.Values $role)) (deepCopy (get $model $role | default dict)) -}}
{{- $pools = append $pools (dict "part" (printf "%s-%s" $role $key) "role" $role "model" $key "values" $values) -}}
{{- end -}}
{{- end -}}
{{- toJson $pools -}}
{{- end }}

{{/* JSON list of all parts there are, by the name of their objects, with their values. */}}
{{- define "sagellm.parts" -}}
{{- $parts := list (dict "part" "router" "values" .Values.router) (dict "part" "gateway" "values" .Values.gateway) -}}
{{- $parts = concat $parts (include "sagellm.pools" . | fromJsonArray) -}}
{{- if .Values.kvStore.replicas }}{{ $parts = append $parts (dict "part" "kv-store" "values" .Values.kvStore) }}{{ end -}}
{{- if .Values.etcd.replicas }}{{ $parts = append $parts (dict "part" "etcd" "values" .Values.etcd) }}{{ end -}}
{{- if .Values.autoscaler.enabled }}{{ $parts = append $parts (dict "part" "autoscaler" "values" .Values.autoscaler) }}{{ end -}}
{{- toJson $parts -}}
{{- end }}

{{/* JSON list of the volumes with checkpoints, and where they are mounted: those that the workers of `model` need, or with
     `all` every one. Called with root, model, all. */}}
{{- define "sagellm.modelVolumes" -}}
{{- $volumes := list -}}
{{- $own := dig .model "volume" (dict) .root.Values.models -}}
{{- if and .root.Values.model.volume (or .all (not $own)) -}}
{{- $volumes = append $volumes (dict "name" "model" "mountPath" .root.Values.model.mountPath "volume" .root.Values.model.volume) -}}
{{- end -}}
{{- range $key, $model := .root.Values.models -}}
{{- if and $model.volume (or $.all (eq $key $.model)) -}}
{{- $volumes = append $volumes (dict "name" (printf "model-%s" $key) "mountPath" $model.mountPath "volume" $model.volume) -}}
{{- end -}}
{{- end -}}
{{- toJson $volumes -}}
{{- end }}

{{/* JSON of all ports: SagePorts of sagellm_common/core/ports.py, where each pod has the ports of the first of its kind. */}}
{{- define "sagellm.ports" -}}
{{- $base := int .Values.portBase -}}
{{- dict "gateway" $base "router" (add $base 1) "routerSession" (add $base 750) "routerMetrics" (add $base 500)
  "worker" (add $base 10) "workerData" (add $base 11) "workerSession" (add $base 751) "workerMetrics" (add $base 501) "customMetrics" (add $base 2)
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
{{- include "sagellm.configOf" (dict "root" . "model" "") -}}
{{- end }}

{{/* Where a part finds it. */}}
{{- define "sagellm.configFile" -}}
/etc/sagellm/config{{ with .model }}.{{ . }}{{ end }}.yaml
{{- end }}

{{/* The same as workers of one of `models` have it; called with root and model. */}}
{{- define "sagellm.configOf" -}}
{{- $model := .root.Values.model -}}
{{- $values := .root.Values.config -}}
{{- if .model -}}
{{- $model = get .root.Values.models .model -}}
{{- $model = dict "path" $model.path "name" ($model.name | default .model) "config" ($model.config | default dict) -}}
{{- $values = mustMergeOverwrite (deepCopy $values) (deepCopy $model.config) -}}
{{- end -}}
{{- with .root -}}
{{- $etcd := include "sagellm.etcdEndpoints" . | fromJsonArray -}}
{{- $topology := dict "backend" "embedded" -}}
{{- if $etcd }}{{ $topology = dict "backend" "etcd" "endpoints" $etcd }}{{ end -}}
{{- $store := dict "enabled" (gt (int .Values.kvStore.replicas) 0) -}}
{{- if .Values.kvStore.disk.size }}{{ $_ := set $store "disk" (dict "path" "/var/lib/sagellm/kv") }}{{ end -}}
{{- $known := dict
  "cluster" (dict "name" (printf "%s-%s" .Release.Namespace (include "sagellm.fullname" .)) "port_base" (int .Values.portBase))
  "model" (dict "path" $model.path "name" $model.name)
  "topology" $topology
  "router" (dict "address" (include "sagellm.routerAddress" .))
  "kv_store" $store -}}
{{- with .Values.autoscaler }}
{{- if .enabled }}
{{- $name := include "sagellm.fullname" $.root -}}
{{- $_ := set $known "autoscaler" (dict
  "mode" (ternary "act" "dry-run" (eq .scaledBy "autoscaler"))
  "min_prefill" (index .bounds.prefill 0) "max_prefill" (index .bounds.prefill 1)
  "min_decode" (index .bounds.decode 0) "max_decode" (index .bounds.decode 1)
  "routers" (list (printf "%s-router-pods.%s.svc:%v" $name $.root.Release.Namespace (include "sagellm.ports" $.root | fromJson).routerMetrics))
  "namespace" $.root.Release.Namespace
  "prefill_target" (printf "deployment/%s-prefill" $name) "decode_target" (printf "deployment/%s-decode" $name)
  "lease" (printf "%s-autoscaler" $name)) -}}
{{- end }}
{{- end }}
{{- mustMergeOverwrite (deepCopy $values) $known | toYaml -}}
{{- end -}}
{{- end }}

{{/* What changes when a part must be started again: its configuration without the sections that are others' alone, so that
     the workers keep their KV when only the autoscaler's bounds or the gateway's limits change. */}}
{{- define "sagellm.configChecksum" -}}
{{- $config := include "sagellm.configOf" (dict "root" .root "model" (.model | default "")) | fromYaml -}}
{{- range $section := list "autoscaler" "gateway" -}}
{{- if ne $section $.part }}{{ $_ := unset $config $section }}{{ end -}}
{{- end -}}
{{- toYaml $config | sha256sum -}}
{{- end }}

{{/* How many pods; nothing where somebody scales them: then an upgrade keeps the number it finds. `scaled`: by the autoscaler. */}}
{{- define "sagellm.replicas" -}}
{{- if or .scaled .values.hpa -}}
{{- with (lookup "apps/v1" "Deployment" .root.Release.Namespace (include "sagellm.name" .)).spec -}}
replicas: {{ .replicas | int }}
{{- end -}}
{{- else -}}
replicas: {{ .values.replicas }}
{{- end -}}
{{- end }}

{{/* What no schema can say. */}}
{{- define "sagellm.check" -}}
{{- range $part := list "router" "gateway" "prefill" "decode" }}
{{- with (get $.Values $part).hpa }}
{{- if gt (int .min) (int .max) }}
{{- fail (printf "%s.hpa.min %v is more than %s.hpa.max %v; lower it, or raise the other" $part .min $part .max) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .Values.router.hpa (eq (include "sagellm.etcdEndpoints" .) "[]") }}
{{- fail "router.hpa needs etcd, for each router would keep a topology of its own: set etcd.replicas or etcd.endpoints" }}
{{- end }}
{{- if not .Values.model.path }}
{{- fail "model.path is empty: set it to the directory of a checkpoint as containers see it, such as /models/Qwen2-7B-Instruct, and model.volume to the volume that has it" }}
{{- end }}
{{- if and .Values.etcd.replicas .Values.etcd.endpoints }}
{{- fail "etcd.endpoints name an etcd of yours, and etcd.replicas starts another: set etcd.replicas to 0, or leave endpoints out" }}
{{- end }}
{{- if and (gt (int .Values.router.replicas) 1) (eq (include "sagellm.etcdEndpoints" .) "[]") }}
{{- fail "router.replicas above 1 needs etcd, for each router would keep a topology of its own: set etcd.replicas or etcd.endpoints" }}
{{- end }}
{{- range $key, $model := .Values.models }}
{{- if and $model.volume (not $model.mountPath) }}
{{- fail (printf "models.%s.mountPath is empty: say where its own volume is mounted, such as /models-%s, and begin models.%s.path with it" $key $key $key) }}
{{- end }}
{{- if and $model.mountPath (not $model.volume) }}
{{- fail (printf "models.%s.mountPath needs models.%s.volume: without one of its own it is on the volume of `model`" $key $key) }}
{{- end }}
{{- if eq ($model.name | default $key) ($.Values.model.name | default (base $.Values.model.path)) }}
{{- fail (printf "models.%s is called %s, as `model` is: clients tell them apart by their names; set models.%s.name" $key ($model.name | default $key) $key) }}
{{- end }}
{{- end }}
{{- if .Values.autoscaler.enabled }}
{{- if and (gt (int .Values.autoscaler.replicas) 1) (ne .Values.autoscaler.scaledBy "autoscaler") }}
{{- fail (printf "autoscaler.replicas above 1 needs scaledBy autoscaler: of several only the one that leads has an answer for %s; set it to 1" .Values.autoscaler.scaledBy) }}
{{- end }}
{{- range $role := list "prefill" "decode" }}
{{- if (get $.Values $role).hpa }}
{{- fail (printf "%s.hpa and autoscaler.enabled would both say how many %s pods there are: leave one of them out" $role $role) }}
{{- end }}
{{- end }}
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

{{/* The pod of one of our services. Called with root, part, values, container (YAML of what differs); role and model where
     there are several parts of a role.
     Worker ids are pod names. Each pod binds its own address, for that is what it tells the others. */}}
{{- define "sagellm.pod" -}}
{{- $role := .role | default .part -}}
{{- $computes := has $role (list "prefill" "decode") -}}
{{- $volumes := list -}}
{{- if or $computes (eq $role "gateway") -}}
{{- $volumes = include "sagellm.modelVolumes" (dict "root" .root "model" (.model | default "") "all" (eq $role "gateway")) | fromJsonArray -}}
{{- end -}}
metadata:
  labels:
    {{- include "sagellm.selector" . | nindent 4 }}
    sagellm.io/role: {{ $role }}
    {{- with .model }}
    sagellm.io/model: {{ . }}
    {{- end }}
    {{- with .values.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "sagellm.configChecksum" . }}
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
  {{- with .values.initContainers }}
  initContainers: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ $role }}
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
        - name: SAGELLM_GATEWAY__TENANT_KEYS
          valueFrom: {secretKeyRef: {name: {{ .values.apiKeysSecret | quote }}, key: tenant_keys, optional: true}}
        {{- end }}
        {{- if and (eq .part "gateway") .root.Values.models }}
        - {name: SAGELLM_MODEL__PATH, value: ""} # each model's tokenizer is where its workers have it
        {{- end }}
        {{- if and .root.Values.routeKeySecret (or $computes (eq $role "router")) }}
        - name: SAGELLM_RPC__ROUTE_KEY
          valueFrom: {secretKeyRef: {name: {{ .root.Values.routeKeySecret | quote }}, key: route_key}}
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
        {{- if $computes }}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- end }}
        {{- range $volumes }}
        - {name: {{ .name }}, mountPath: {{ .mountPath | quote }}, readOnly: true}
        {{- end }}
        {{- if and (eq .part "kv-store") .values.disk.size }}
        - {name: kv, mountPath: /var/lib/sagellm}
        {{- end }}
        {{- with .values.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - {name: config, configMap: {name: {{ include "sagellm.fullname" .root }}}}
    - {name: tmp, emptyDir: {}}
    {{- if $computes }}
    - {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: {{ .root.Values.sharedMemory | quote }}}}
    {{- end }}
    {{- range $volumes }}
    - name: {{ .name }}
      {{- toYaml .volume | nindent 6 }}
    {{- end }}
    {{- with .values.volumes }}
    {{- toYaml . | nindent 4 }}
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
{{- with include "sagellm.affinity" . | fromYaml }}
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

{{/* Who moves KV is placed near those it moves it to and from; what the part's own affinity says of pods counts instead. */}}
{{- define "sagellm.affinity" -}}
{{- $affinity := deepCopy (.values.affinity | default dict) -}}
{{- $moves := has (.role | default .part) (list "prefill" "decode" "kv-store") -}}
{{- if and $moves .root.Values.kvTopologyKey (not (hasKey $affinity "podAffinity")) -}}
{{- $own := include "sagellm.selector" (dict "root" .root "part" "") | fromYaml -}}
{{- $kv := dict "key" "sagellm.io/role" "operator" "In" "values" (list "prefill" "decode" "kv-store") -}}
{{- $term := dict "topologyKey" .root.Values.kvTopologyKey "labelSelector" (dict "matchLabels" $own "matchExpressions" (list $kv)) -}}
{{- $preferred := list (dict "weight" 50 "podAffinityTerm" $term) -}}
{{- $_ := set $affinity "podAffinity" (dict "preferredDuringSchedulingIgnoredDuringExecution" $preferred) -}}
{{- end -}}
{{- toYaml $affinity -}}
{{- end }}

{{/* gRPC health as kubelet asks for it. Called with port and startSeconds. A worker that drains is not ready, but `live`. */}}
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
  grpc: {port: {{ .port }}, service: live}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
{{- end }}

{{/* Of a worker; called with root, part, values, and role and model where the part is not a role's only one. */}}
{{- define "sagellm.worker" -}}
{{- $ports := include "sagellm.ports" .root | fromJson -}}
{{- if eq .part "kv-store" }}
command: [python, -m, services.kv_store]
{{- else }}
command: [python, -m, services.worker]
{{- end }}
args:
  {{- if ne .part "kv-store" }}
  - --role={{ .role }}
  {{- end }}
  - --config={{ include "sagellm.configFile" . }}
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
