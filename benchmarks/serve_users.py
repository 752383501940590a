"""The clients of `serve_load.py`, for Locust: each asks once a second for a random image, and writes down the outcome.

    locust --headless -f benchmarks/serve_users.py --host http://127.0.0.1:8000

Environment: LOAD_IMAGES (JSON list of [path, class]), LOAD_PHASES (JSON list of [seconds, users]), LOAD_OUTPUT (file
of JSON lines to write), LOAD_PERIOD (seconds from one request of a user to the next, 1 by default).
"""
import atexit
import json
import os
import random
import time
from pathlib import Path

from locust import FastHttpUser, LoadTestShape, constant_throughput, task

IMAGES = [(Path(path).read_bytes(), name) for path, name in json.loads(os.environ['LOAD_IMAGES'])]
PHASES = json.loads(os.environ['LOAD_PHASES'])
OUTPUT = open(os.environ['LOAD_OUTPUT'], 'w')  # noqa: SIM115
atexit.register(OUTPUT.close)


class Client(FastHttpUser):
    """Not slowed down by answers that take less than a period: the load does not depend on how the service does."""
    wait_time = constant_throughput(1 / float(os.environ.get('LOAD_PERIOD', 1)))
    connection_timeout = network_timeout = 60.
    insecure = True

    def on_start(self):
        """Spread the users over the period."""
        time.sleep(random.random() * float(os.environ.get('LOAD_PERIOD', 1)))

    @task
    def predict(self):
        """Ask once, and record what came of it."""
        data, name = random.choice(IMAGES)
        sent = time.time()
        record = {'sent': sent, 'status': None}
        OUTPUT.flush()
        try:
            with self.client.post('/predict', data=data, catch_response=True) as response:
                record.update(seconds=time.time() - sent, status=response.status_code)
                if response.status_code == 200:
                    answer = response.json()
                    record.update(members=answer['num_members'], correct=answer['classes'][0]['name'] == name)
                response.success()  # a refusal is an outcome here, no error of the test
        finally:
            OUTPUT.write(json.dumps(record) + '\n')


class Phases(LoadTestShape):
    """Numbers of users over time."""

    def tick(self):
        """Return how many users there shall be now, and how many may start in a second."""
        now = self.get_run_time()
        for seconds, users in PHASES:
            if now < seconds:
                return users, 1000
            now -= seconds
        return None
