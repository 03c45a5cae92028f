"""Create the RayJob of a scheduled sweep and wait for its end, so that the CronJob knows whether one is running.

In: rayjob.yaml beside this file; the environment's JOB, the name of the Kubernetes Job that this runs in. Out: exit
code 0 if the sweep has succeeded, 2 if it has failed or a Job made by hand finds that its name is taken. Runs in a
plain Python image: standard library only.
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


def scheduled(job: str) -> int | None:
    """Minutes since 1970 for which the CronJob `axonym` made the Job: Kubernetes ends its name with them.

    None for a Job made by hand.
    """
    minutes = re.fullmatch(r"axonym-(\d{8})", job)
    return int(minutes[1]) if minutes else None


def run_name(job: str) -> str:
    """Date and time (UTC) for which the Job was scheduled; a Job made by hand gives its own name."""
    minutes = scheduled(job)
    return job if minutes is None else time.strftime("%Y-%m-%d-%H%M", time.gmtime(60 * minutes))


def manifest(run: str) -> str:
    """The RayJob of that run, as YAML; `run` is letters, digits and hyphens, as all names in Kubernetes are."""
    return Path(__file__).with_name("rayjob.yaml").read_text().replace("by-hand", run)


def namespace() -> str:
    return (ACCOUNT / "namespace").read_text()


def call(name: str = "", body: str | None = None) -> dict:
    """Answer of the API server: for a new RayJob with a body, for the RayJob of that name without one."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    url = f"https://{host}:{port}/apis/ray.io/v1/namespaces/{namespace()}/rayjobs{name and '/' + name}"
    # Read anew each time: the token is renewed every hour.
    headers = {"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}", "Content-Type": "application/yaml"}
    trusted = ssl.create_default_context(cafile=ACCOUNT / "ca.crt")
    request = Request(url, body.encode() if body else None, headers)
    with urlopen(request, timeout=60, context=trusted) as answer:
        return json.load(answer)


def main() -> int:
    job = os.environ["JOB"]
    run, taken = run_name(job), False
    try:
        call(body=manifest(run))
        print(f"created axonym-{run}", flush=True)
    except HTTPError as error:
        if error.code != 409:
            raise
        print(f"axonym-{run} is there already", flush=True)
        # Of a scheduled Job this is another try. By hand it may be last week's sweep: then nothing would be computed.
        taken = scheduled(job) is None
    while True:
        try:
            status = call(f"axonym-{run}").get("status", {})
        except OSError as error:  # the API server restarts now and then
            if isinstance(error, HTTPError) and error.code < 500:
                raise
            print(error, flush=True)
        else:
            if status.get("jobDeploymentStatus") in ("Complete", "Failed"):
                if taken:
                    hint = f"another name, or first kubectl -n {namespace()} delete rayjob axonym-{run}"
                    print(f"nothing was run: axonym-{run} had ended before; take {hint}", flush=True)
                    return 2
                print(status.get("jobStatus"), status.get("message", ""), flush=True)
                return 0 if status.get("jobStatus") == "SUCCEEDED" else 2
            taken = False  # it is running: its end is awaited
        time.sleep(PAUSE)


if __name__ == "__main__":
    sys.exit(main())
