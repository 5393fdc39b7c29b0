"""The separation service over HTTP.

From the ground up: `state`, `elsewhere`, `results`, `config`, `connections`, `memory`, `place`, `uploads`, `failures`,
`answers`, `names`, `problems`, `window`, `hotmodel`, `device`, `requests`, `jobs`, `archive`, `service`, `guard`,
`separations`, `about`, `api`, `local`. Import the files themselves: Serve's proxies need `connections` alone.
"""
