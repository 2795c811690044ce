"""Each job of the databases is killed at every step that it takes, with nobody left to say so; its sweep does the rest.

Inside a step, each engine is killed before every single thing that it does: see test_databases_kill_points.py.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from databases.jobs import (
    create_branch,
    create_database,
    delete_database,
    deploy,
    schedule_branches,
    schedule_database_deletions,
    schedule_databases,
    schedule_deploys,
)
from databases.models import Database, DeployRequest
from jobs.models import Claim, Run
from jobs.testing import drain, perform
from tests.engines import Engine, password_of
from tests.integration.killing import killed

pytestmark = pytest.mark.django_db(transaction=True)

ENGINES = {
    "sqlite": "databases.provisioners.sqlite.SQLiteProvisioner",
    "postgresql": "databases.provisioners.postgresql.PostgreSQLProvisioner",
}
# The row says so, and the claim is still there.
SETTLE = ("before", "jobs.claims.settle")


def steps(method: str, *written: str) -> list[tuple[str, str]]:
    """Before and after what is done to the outside, before that is written down is committed, and after."""
    return [
        ("before", f"ENGINE.{method}"),
        ("after", f"ENGINE.{method}"),
        *(("after", each) for each in written),
        SETTLE,
    ]


@pytest.fixture
def make(engine: Engine, django_user_model) -> Callable[..., Database]:
    owner = django_user_model.objects.create_user("ada")

    def make(name: str, state: str = Database.State.READY, **fields: Any) -> Database:
        if state == Database.State.READY:
            engine.fill(name)
        password = password_of(name)
        return Database.objects.create(
            name=name, owner=owner, engine=engine.name, password=password, state=state, **fields
        )

    return make


@pytest.fixture
def kill(engine: Engine, redis, tmp_path) -> Callable[..., None]:
    """Have a process of its own do the work, killed there, worker and all; its lease is over, and the queue is lost."""

    def kill(step: tuple[str, str], job: Any, row: Any) -> None:
        when, function = step
        assert killed(tmp_path, when, function.replace("ENGINE", ENGINES[engine.name]), perform, job, row)
        assert Claim.objects.update(lease_expires_at=timezone.now() - timedelta(hours=1)) == 1
        redis.flushall()

    return kill


def healed(sweep: Any, job: Any) -> bool:
    """Sweep, and do what that finds. Whether nothing is left to be settled, and the work was done once more at most."""
    sweep.sweep()
    drain()
    assert not sweep().exists()
    assert not Claim.objects.exists()
    return Run.objects.filter(job=job.name, outcome__in=["done", "resolved"]).count() <= 1


def there(engine: Engine, *names: str) -> bool:
    """Whether there is what belongs to these databases, and nothing else."""
    kinds = ["{}.sqlite3"] if engine.name == "sqlite" else ["database {}", "role {}"]
    assert engine.everything() == {kind.format(name) for name in names for kind in kinds}
    return True


@pytest.mark.parametrize("step", steps("create", "databases.models.Database.become_ready"), ids=str)
def test_a_creation(engine, make, kill, step):
    shop = make("shop", Database.State.PENDING)
    kill(step, create_database, shop)
    assert healed(schedule_databases, create_database)
    shop.refresh_from_db()
    assert shop.state == Database.State.READY
    assert there(engine, "shop")


@pytest.mark.parametrize("step", steps("copy", "databases.models.Database.become_ready"), ids=str)
def test_a_branch(engine, make, kill, step):
    shop = make("shop")
    branch = make("branch", Database.State.PENDING, origin=Database.Origin.COPY, parent=shop)
    kill(step, create_branch, branch)
    assert healed(schedule_branches, create_branch)
    branch.refresh_from_db()
    assert branch.state == Database.State.READY
    assert there(engine, "shop", "branch")
    assert engine.ask("branch", "SELECT count(*) FROM orders") == [(3,)]


@pytest.mark.parametrize("step", steps("delete", "databases.models.Database.become_deleted"), ids=str)
def test_a_deletion(engine, make, kill, step):
    shop = make("shop")
    shop.request_deletion()
    kill(step, delete_database, shop)
    assert healed(schedule_database_deletions, delete_database)
    shop.refresh_from_db()
    assert shop.state == Database.State.DELETED
    assert there(engine)


@pytest.mark.parametrize(
    "step",
    [
        ("after", "databases.models.DeployRequest.become"),
        *steps("deploy", "databases.jobs.tried_and_made", "databases.models.DeployRequest.become_deployed"),
    ],
    ids=str,
)
def test_a_deploy(engine, make, kill, step):
    change = "CREATE TABLE visits (id integer); INSERT INTO orders VALUES (7, 'a visit', 0, NULL)"
    branch, shop = make("branch"), make("shop")
    request = DeployRequest.objects.create(branch=branch, target=shop, sql=change, requested_by=shop.owner)
    kill(step, deploy, request)
    assert healed(schedule_deploys, deploy)
    request.refresh_from_db()
    assert request.state == DeployRequest.State.DEPLOYED, request.error
    assert there(engine, "shop", "branch")
    for name in ("branch", "shop"):
        assert engine.ask(name, "SELECT count(*) FROM orders WHERE id = 7") == [(1,)]
        assert engine.ask(name, "SELECT count(*) FROM selfheal_deploys WHERE marker <> 'filled'") == [(1,)]
