#!/usr/bin/env bash
# turns.sh COMMAND...: runs it when one of as many places as there are cores is free. A compiler launcher for builds that start a
# compiler for every file at once.
exec flock "${TMPDIR:-/tmp}/ashlar-turns.$UID.$((RANDOM % $(nproc)))" "$@"
