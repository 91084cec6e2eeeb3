# What the other scripts share; sourced, not run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/targon-engine
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/targon-engine/target}
models=${TARGON_ENGINE_MODELS:-$HOME/.cache/targon-engine/models}
model_file=SmolLM2-135M-Instruct.Q4_1.gguf

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
fail() {
    printf 'error: %s\n' "$1" >&2
    [ $# -gt 1 ] && printf '\nhint: %s\n' "$2" >&2
    exit 1
}

# Installs Debian packages that provide the given commands, where they are missing:
# need_commands COMMAND:PACKAGE ...
need_commands() {
    local missing=() pair
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -eq 0 ] && return
    need_packages "${missing[@]}"
}

need_packages() {
    local sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    command -v apt-get >/dev/null ||
        fail "these are missing: $*" "install them with your system's package manager"
    [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null ||
        fail "these are missing: $*" "as root: apt-get install $*"
    say "installing $*"
    "${sudo[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq "$@" >/dev/null
}

# A Rust toolchain of at least the version in Cargo.toml.
need_rust() {
    local want have
    [ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
    want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    if ! command -v cargo >/dev/null; then
        say "installing Rust"
        curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal \
            -c clippy -c rustfmt >/dev/null ||
            fail "Rust could not be installed" "install Rust $want or newer from https://rustup.rs"
        . "$HOME/.cargo/env"
    fi
    have=$(rustc --version | cut -d' ' -f2)
    [ "$(printf '%s\n%s\n' "$want" "$have" | sort -V | head -n 1)" = "$want" ] ||
        fail "Rust $want or newer is needed, this is $have" "rustup update stable"
}

# Unpacks Python packages into a directory, without installing anything of them:
# unpack_wheels DIRECTORY HINT NAME==VERSION ...
unpack_wheels() {
    local place=$1 hint=$2 wheel
    shift 2
    need_commands python3:python3
    python3 -m pip --version >/dev/null 2>&1 || need_packages python3-pip
    python3 -m pip download --quiet --no-deps --dest "$place" "$@" >&2 ||
        fail "the package $1 could not be downloaded" "check the network; or $hint"
    for wheel in "$place"/*.whl; do
        python3 -m zipfile -e "$wheel" "$place"
        rm "$wheel"
    done
}
