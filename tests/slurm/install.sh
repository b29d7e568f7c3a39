#!/usr/bin/env bash
# Installs what tests/slurm and the checks of shell scripts need, where that is harmless: as root, from the distribution's
# packages, on a machine without systemd (a container, a CI job), where no service is started by an installation.
# Anywhere else it does nothing, and the tests that need it are skipped with the reason.
set -uo pipefail

for program in slurmctld munged ip shellcheck; do
    PATH=$PATH:/usr/sbin:/sbin command -v $program > /dev/null || missing=yes
done
[ "${missing:-no}" = yes ] || exit 0
if [ "$(id -u)" != 0 ] || [ -d /run/systemd/system ] || ! command -v apt-get > /dev/null; then
    exit 0
fi
echo "installing SLURM from the distribution's packages, for tests/slurm" >&2
export DEBIAN_FRONTEND=noninteractive
{
    timeout 90 apt-get -qq -o Acquire::Retries=1 update &&
        timeout 300 apt-get -qq install -y --no-install-recommends slurm-wlm munge iproute2 shellcheck
} > /dev/null 2>&1 || echo "the installation failed; tests/slurm will be skipped" >&2
