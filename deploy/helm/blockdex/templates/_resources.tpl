{{/* A manifest of deploy/kubernetes/base, named and labelled for this release: (list $ "service") */}}
{{- define "blockdex.manifest" -}}
{{- $root := index . 0 -}}
{{- $resource := $root.Files.Get (printf "files/base/%s.yaml" (index . 1)) | fromYaml -}}
{{- $labels := dict "app.kubernetes.io/instance" $root.Release.Name "app.kubernetes.io/managed-by" $root.Release.Service -}}
{{- $_ := set $resource.metadata "name" $root.Release.Name -}}
{{- $_ := set $resource.metadata "labels" (merge $resource.metadata.labels $labels) -}}
{{- toYaml $resource -}}
{{- end -}}

{{/* Labels that tell this release's pods from another's. */}}
{{- define "blockdex.selector" -}}
{{- dict "app.kubernetes.io/name" "blockdex" "app.kubernetes.io/instance" .Release.Name | toYaml -}}
{{- end -}}
