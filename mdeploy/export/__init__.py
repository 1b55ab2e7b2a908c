"""Services for other people's supervisors: nginx sites, compose files, Kubernetes manifests. Values in, text out."""
