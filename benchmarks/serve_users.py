"""The clients of `serve_load.py`, for Locust: each asks about once a second, and writes down what became of it.

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

from locust import FastHttpUser, LoadTestShape, task

IMAGES = [(Path(path).read_bytes(), name) for path, name in json.loads(os.environ['LOAD_IMAGES'])]
PHASES = json.loads(os.environ['LOAD_PHASES'])
OUTPUT = open(os.environ['LOAD_OUTPUT'], 'w')  # noqa: SIM115
atexit.register(OUTPUT.close)


PERIOD = float(os.environ.get('LOAD_PERIOD', 1))


class Client(FastHttpUser):
    """Asks at random times that do not depend on how long answers take, as long as these take less than a period."""
    connection_timeout = network_timeout = 60.
    due = None

    def wait_time(self):
        """Return the seconds until the next request. Locust's `constant_throughput` would bring all users in step."""
        now = time.time()
        self.due = (now if self.due is None else self.due) + random.expovariate(1 / PERIOD)
        return max(0., self.due - now)

    def on_start(self):
        """Begin at a random time."""
        time.sleep(random.random() * PERIOD)

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
