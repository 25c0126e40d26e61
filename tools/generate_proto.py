"""Compile proto/*.proto into amct_ext/proto/descriptors.py.

    pip install grpcio-tools && python tools/generate_proto.py

The result is carried in git, so neither a build nor a run needs a protobuf compiler; run this after a change of a
.proto file. `--check` only compares (exit status 1 if the carried file is stale).
"""

import argparse
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("retrain_config.proto", "record.proto")
TARGET = ROOT / "amct_ext" / "proto" / "descriptors.py"
HEAD = '"""Made by tools/generate_proto.py from proto/*.proto: a serialized FileDescriptorSet. Do not edit."""\n'


def compiled() -> bytes:
    """The FileDescriptorSet of proto/*.proto, serialized."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set.pb"
        subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", f"--descriptor_set_out={out}", *SOURCES],
            check=True,
        )
        return out.read_bytes()


def module_text(data: bytes) -> str:
    """Python text that carries `data` as hexadecimal text."""
    lines = textwrap.wrap(data.hex(), 108)
    body = "\n".join(f'    "{line}"' for line in lines)
    return f"{HEAD}\nDESCRIPTORS = bytes.fromhex(\n{body}\n)\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    arguments = parser.parse_args()
    text = module_text(compiled())
    if arguments.check:
        if TARGET.read_text() == text:
            return 0
        print(f"{TARGET} does not match proto/*.proto: run tools/generate_proto.py", file=sys.stderr)
        return 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
