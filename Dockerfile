# The image of gbla-rec for GPUs, for Kubernetes, AWS Batch and `docker run`:
#   docker build -t gbla-rec --build-arg COMMIT="$(git rev-parse HEAD)" .
#   docker run --rm --gpus all gbla-rec gbla-rec doctor
# torch's wheels bring CUDA, cuDNN and NCCL. EFA is not in here: libfabric and NCCL's plugin aws-ofi-nccl belong to the
# base, so for AWS give an Ubuntu base that has them, with LD_LIBRARY_PATH set to both: --build-arg BASE=...
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${BASE}

# gcc and Python's headers: Triton compiles a launcher when a kernel runs for the first time
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

WORKDIR /opt/gbla-rec
# dependencies alone: this layer has gigabytes and changes with the pins only
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install -c constraints.txt '.[metrics,text,report,benchmarks,cudnn]'
COPY gbla_rec gbla_rec
COPY kernels kernels
COPY apps apps
COPY benchmarks benchmarks
COPY examples examples
# editable: recipes find examples/data, and `benchmark` its script, as in a checkout
RUN pip install -c constraints.txt --no-deps -e . && python -m compileall -q gbla_rec kernels apps

# mounted volumes must be writable for this user
ARG UID=10001
RUN useradd --create-home --uid ${UID} gbla && install -d -o gbla -g gbla /workspace
USER ${UID}
ARG COMMIT=
ENV GBLA_REC_COMMIT=${COMMIT} \
    GBLA_REC_WORKSPACE=/workspace

# seldom: it imports every library and takes a small part of each GPU
HEALTHCHECK --interval=6h --timeout=5m CMD ["gbla-rec", "doctor"]
# none, as TorchX starts bash and python itself
ENTRYPOINT []
CMD ["gbla-rec", "--help"]
