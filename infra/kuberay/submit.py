"""Create the RayJob of a scheduled sweep and wait for its end, so that the CronJob knows whether one is running.

In: rayjob.yaml beside this file; the environment's JOB, the name of the Kubernetes Job that this runs in. Out: exit
code 0 if the sweep has succeeded, 2 if it has failed. Runs in a plain Python image: standard library only.
"""

import json
import os
import re
import ssl
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PAUSE = 30
"""Seconds between two looks at the sweep."""


def run_name(job: str) -> str:
    """Date and time (UTC) for which the Job was scheduled: Kubernetes ends its name with the minutes since 1970.

    So a second try of the same Job finds the RayJob of the first. A Job made by hand gives its own name.
    """
    minutes = re.fullmatch(r".+-(\d{8})", job)
    return time.strftime("%Y-%m-%d-%H%M", time.gmtime(60 * int(minutes[1]))) if minutes else job


def manifest(run: str) -> str:
    """The RayJob of that run, as YAML; `run` is letters, digits and hyphens, as all names in Kubernetes are."""
    return Path(__file__).with_name("rayjob.yaml").read_text().replace("by-hand", run)


def call(name: str = "", body: str | None = None) -> dict:
    """Answer of the API server: for a new RayJob with a body, for the RayJob of that name without one."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    namespace = (ACCOUNT / "namespace").read_text()
    url = f"https://{host}:{port}/apis/ray.io/v1/namespaces/{namespace}/rayjobs{name and '/' + name}"
    # Read anew each time: the token is renewed every hour.
    headers = {"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}", "Content-Type": "application/yaml"}
    trusted = ssl.create_default_context(cafile=ACCOUNT / "ca.crt")
    request = Request(url, body.encode() if body else None, headers)
    with urlopen(request, timeout=60, context=trusted) as answer:
        return json.load(answer)


def main() -> int:
    run = run_name(os.environ["JOB"])
    try:
        call(body=manifest(run))
        print(f"created axonym-{run}", flush=True)
    except HTTPError as error:
        if error.code != 409:
            raise
        print(f"axonym-{run} is there already", flush=True)
    while True:
        time.sleep(PAUSE)
        try:
            status = call(f"axonym-{run}").get("status", {})
        except OSError as error:  # the API server restarts now and then
            if isinstance(error, HTTPError) and error.code < 500:
                raise
            print(error, flush=True)
            continue
        if status.get("jobDeploymentStatus") in ("Complete", "Failed"):
            print(status.get("jobStatus"), status.get("message", ""), flush=True)
            return 0 if status.get("jobStatus") == "SUCCEEDED" else 2


if __name__ == "__main__":
    sys.exit(main())
