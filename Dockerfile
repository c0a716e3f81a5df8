# vl2-jax in a container, for a CPU or for the host of a TPU.
#
#   docker build -t vl2-jax .
#   docker build -t vl2-jax:tpu --build-arg EXTRAS=tpu,serve,train,gcs .
#
#   docker run --rm -p 127.0.0.1:8000:8000 -e VL2_API_KEY=... vl2-jax serve vl2-nano --host 0.0.0.0
#   docker run --rm --privileged --network host -v /mnt/models:/models vl2-jax:tpu serve /models/small --mesh auto
#
# The user in it is no administrator. Where the TPU's devices (/dev/accel*, /dev/vfio) belong to root alone, as on some
# hosts, add `--user 0`. Programs that were compiled are kept with `-v vl2-cache:/home/vl2/.cache/vl2-jax`.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY convert convert
COPY vl2_jax vl2_jax
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON}-slim
ARG EXTRAS=serve
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir "$(ls /dist/vl2_jax-*.whl)[${EXTRAS}]" \
    && useradd --create-home --uid 1000 vl2 \
    && install --directory --owner=vl2 --group=vl2 /home/vl2/.cache/vl2-jax
USER 1000:1000
WORKDIR /home/vl2
EXPOSE 8000
ENTRYPOINT ["vl2"]
CMD ["--help"]
