"""Job of gpu.py: the tests that need a GPU, and those of what GPUs are told."""

import subprocess
import sys
import xml.etree.ElementTree

import job


def main() -> None:
    flags = job.parse_flags()
    results = flags.out.with_suffix(".xml")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "tests/models/test_attention.py",
        "-k",
        "gpu or cudnn or tokamax",
    ]
    code = subprocess.run([*command, f"--junitxml={results}"], cwd=job.ROOT).returncode
    suite = xml.etree.ElementTree.parse(results).getroot().find("testsuite")
    found = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    job.write(flags, found)
    sys.exit(code)


if __name__ == "__main__":
    main()
