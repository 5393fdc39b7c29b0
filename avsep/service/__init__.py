"""The separation service over HTTP.

From the ground up: `config`, `work` (errors), `connections`, `results`, `uploads`, `answers`, `problems`, `requests`,
`window`, `hotmodel`, `jobs`, `archive`, `guard`, `service`, `api`. Import the files themselves: Serve's proxies
need `connections` alone.
"""
