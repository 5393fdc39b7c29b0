"""Programs that one runs or submits: each reads files, maps a function of avsep over them, writes files."""
