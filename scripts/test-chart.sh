#!/usr/bin/env bash
# Tests the chart, the rules and the dashboard alone, without building anything: scripts/test-chart.sh [PYTEST ARGUMENTS].
set -euo pipefail
source "$(dirname "$0")/lib.sh"

scripts/setup-tests.sh
PATH=$ROOT/.venv/bin:$PATH exec python -m pytest -p no:cacheprovider helm/tests "$@"
