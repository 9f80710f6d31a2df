# syntax=docker/dockerfile:1
# A server of one model, without torch. Build: docker build -t ced . Run: docs/serve.md.
# To pin the base image: docker build --build-arg PYTHON=python:3.11-slim@sha256:... -t ced .

ARG PYTHON=python:3.11-slim

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY locks locks
# Only files whose hashes are in the locks are installed, and nothing is resolved or downloaded beside them.
RUN python -m venv /opt/ced \
    && /opt/ced/bin/pip install --no-deps --require-hashes -r locks/serve.txt \
    && pip install --no-deps --require-hashes -r locks/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY ced ced
RUN pip wheel --no-deps --no-build-isolation --no-index -w wheels . \
    && /opt/ced/bin/pip install --no-deps --no-index wheels/*.whl \
    && /opt/ced/bin/pip check

FROM ${PYTHON}
RUN useradd --system --uid 10001 --no-create-home ced \
    && install -d -o ced -g ced /var/cache/ced
COPY --from=build /opt/ced /opt/ced
# One thread a window: the server runs as many windows at a time as there are cores.
ENV PATH=/opt/ced/bin:$PATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 CED_CACHE=/var/cache/ced \
    ORT_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 RAY_USAGE_STATS_ENABLED=0
USER ced
VOLUME /var/cache/ced
EXPOSE 8000
# The first start downloads the model.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz/live', timeout=4)"]
ENTRYPOINT ["ced", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["-m", "ced_mini"]
