# The image of nodes with AWS's Elastic Fabric Adapter: cluster/Dockerfile's, and AWS's libfabric and plugin for NCCL. FOLDER
# holds aws-efa-installer-VERSION.tar.gz, 1.44 or newer, whose signature you have checked (docs/aws.md):
#   docker build -f cluster/efa.Dockerfile --build-arg IMAGE=IMAGE -t IMAGE-efa FOLDER
ARG IMAGE
FROM ${IMAGE}

# hadolint ignore=DL3002
USER 0
WORKDIR /tmp/efa
# An archive of the folder is unpacked by this.
ADD aws-efa-installer-*.tar.gz ./
WORKDIR /tmp/efa/aws-efa-installer
# The driver is the host's. It fails where the installer brings no plugin of the name that NCCL looks for.
RUN apt-get update \
    && ./efa_installer.sh --yes --skip-kmod --skip-limit-conf --no-verify \
    && find /opt/amazon -name 'libnccl-net-ofi.so' -printf '%h\n' > /etc/ld.so.conf.d/ofi-nccl.conf \
    && test -s /etc/ld.so.conf.d/ofi-nccl.conf \
    && ldconfig \
    && rm -rf /tmp/efa /var/lib/apt/lists/*

ENV FI_PROVIDER=efa NCCL_NET_PLUGIN=ofi
USER 1000
WORKDIR /home/unclip
