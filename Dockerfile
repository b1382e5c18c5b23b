# Two images from one file: `server` (API, projections; no torch) and `trainer` (training and inference).

FROM python:3.12-slim AS server
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY rose rose
COPY projections projections
COPY trainer trainer
COPY cli cli
COPY migrations migrations
RUN pip install -c constraints.txt ".[graders]" \
    && useradd --create-home --uid 1000 rose \
    && install -d -o rose -g rose -m 700 /var/lib/rose
USER rose
WORKDIR /home/rose
VOLUME /var/lib/rose
ENV ROSE_DATA_DIR=/var/lib/rose
CMD ["rose", "serve", "api"]

FROM server AS trainer
USER root
RUN cd /src && pip install -c constraints.txt '.[trainer]'
USER rose
CMD ["rose", "serve", "trainer"]
