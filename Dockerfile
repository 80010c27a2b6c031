# Steadyread in a container, in front of a cluster that is there already.
#
#   docker build -t steadyread .
#   docker run --rm --network host steadyread serve --seed 10.0.0.11:6379 --seed 10.0.0.12:6379
#   redis-cli -p 7379 PING
#
# The proxy connects to the addresses that the nodes announce (CLUSTER NODES), so the container must reach those:
# on the host's network as above, or on the network that the nodes are on, with the ports published:
#
#   docker run --rm --network cluster-net -p 7379:7379 -e STEADYREAD_ADMIN__TOKEN=... steadyread \
#       serve --seed node-1:6379 --listen 0.0.0.0:7379 --admin 0.0.0.0:7380
#
# The admin port listens beyond loopback only with a token; /healthz, which the health check asks from inside,
# needs none.
# The record (topology, events, audit) lies in /var/lib/steadyread; mount a volume there to keep it, and to share it
# between the proxies of a cluster on one host: -v steadyread:/var/lib/steadyread, with --set
# store.file=/var/lib/steadyread/topology.sqlite where their admin ports differ.
#
# Options stand in `docker run --rm steadyread serve --help`; a settings file can be mounted and named by --config.
#
# For builds that must not change with time, name the base image by what it holds, not by its tag alone:
#   docker build --build-arg BASE=python:3.12.11-slim-bookworm@sha256:<digest> .
# with the digest from: docker buildx imagetools inspect python:3.12.11-slim-bookworm
ARG BASE=python:3.12.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY proxy proxy
COPY routing routing
RUN pip wheel --no-cache-dir --wheel-dir /wheels .

FROM ${BASE}
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels steadyread \
    && useradd --system --no-create-home --shell /usr/sbin/nologin steadyread \
    && install --directory --owner=steadyread --mode=0700 /var/lib/steadyread
USER steadyread
WORKDIR /tmp
ENV PYTHONUNBUFFERED=1 XDG_STATE_HOME=/var/lib
VOLUME /var/lib/steadyread
EXPOSE 7379 7380
# urlopen raises, so python exits with 1, on a refusal, a time-out and any status of 400 and more.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7380/healthz', timeout=2)"]
# SIGTERM lets requests in flight end; allow at least stop_deadline_seconds (10) before a kill: docker stop -t 15.
STOPSIGNAL SIGTERM
ENTRYPOINT ["steadyread"]
CMD ["serve"]
