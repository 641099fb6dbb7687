"""A small mesh as operators would write it."""

SHOP = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, annotations: {mesh.pillion.dev/add-headers: "x-request-id, traceparent"}}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: redis, namespace: shop}
spec: {selector: {app: redis}, ports: [{name: redis, port: 6379}, {name: stats, port: 8125, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {name: batch, namespace: jobs}
spec: {selector: {app: batch}, ports: [{port: 7000, appProtocol: tcp}, {port: 7001}]}
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: Workload
metadata: {name: web-1, namespace: shop, labels: {app: web, version: v1}}
spec: {node: n1, serviceAccount: web, addresses: [10.77.1.2, "fd77:1::2"]}
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: Workload
metadata: {name: web-2, namespace: shop, labels: {app: web, version: v2}}
spec: {node: n2, serviceAccount: web, addresses: [10.77.2.2, "fd77:2::2"]}
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: Workload
metadata: {name: redis-1, namespace: shop, labels: {app: redis}}
spec: {node: n1, serviceAccount: redis, addresses: [10.77.1.3, "fd77:1::3"]}
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: Workload
metadata: {name: batch-1, namespace: jobs, labels: {app: batch}}
spec: {node: n3, serviceAccount: batch, addresses: [10.77.3.2]}
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: Workload
metadata: {name: intruder, namespace: evil, labels: {app: intruder}}
spec: {node: n4, serviceAccount: intruder, addresses: [10.77.4.2]}
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  rules:
  - from: [{source: {principals: [mesh.local/ns/jobs/sa/batch]}}]
    to: [{operation: {methods: [GET], paths: ["/api/*"]}}]
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: redis, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: redis}]
  rules: [{from: [{source: {principals: [mesh.local/ns/shop/sa/web]}}]}]
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: no-evil, namespace: pillion-system}
spec: {action: DENY, selector: {matchLabels: {app: batch}}, rules: [{from: [{source: {namespaces: [evil]}}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{kind: Service, name: web, port: 80}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /api}}]
    backendRefs: [{name: web, port: 80}]
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: old, namespace: shop}
spec: {selector: {matchLabels: {app: redis}}, mtls: {mode: PERMISSIVE}}
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec:
  outboundAllow: [{cidr: 192.0.2.0/24, ports: [443]}, {cidr: 192.0.2.7/32, ports: [80]}]
  dnsUpstreams: ["192.0.2.53:53"]
"""
