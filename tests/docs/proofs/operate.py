"""What the page on operating claims, in the project that has done what it says."""

import configparser
import shlex
from pathlib import Path

import yaml
from django.core.management import get_commands
from django_rq import get_queue
from redis.connection import SSLConnection
from redis.sentinel import SentinelConnectionPool

HERE = Path(__file__).parent


def containers():
    for service in yaml.safe_load((HERE / "compose.yaml").read_text())["services"].values():
        yield shlex.split(service["command"])
    for document in yaml.safe_load_all((HERE / "workers.yaml").read_text()):
        spec = document["spec"]
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
        for container in spec["template"]["spec"]["containers"]:
            yield container["args"]


def units():
    for path in HERE.glob("*.service"):
        unit = configparser.RawConfigParser()
        unit.optionxform = str
        unit.read(path)
        assert {"Unit", "Service", "Install"} == set(unit.sections())
        yield unit["Service"]["ExecStart"].split()


def test_what_is_deployed_are_commands_that_exist(settings):
    started = [words[words.index("manage.py") + 1 :] for words in (*units(), *containers()) if "manage.py" in words]
    assert sorted(words[0] for words in started) == ["rqscheduler"] * 3 + ["rqworker"] * 3
    for name, *queues in started:
        assert name in get_commands()
        assert set(queues) <= set(settings.RQ_QUEUES)


def test_a_redis_with_tls_and_one_behind_sentinel(settings):
    from shop import production

    settings.RQ_QUEUES = production.RQ_QUEUES
    assert get_queue("urgent").connection.connection_pool.connection_class is SSLConnection
    pool = get_queue("background").connection.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.service_name == "shop"
