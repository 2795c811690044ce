"""Worker and child are killed in the middle of a branch and of a deploy, on each engine; the sweeps do the rest."""

from collections.abc import Callable
from pathlib import Path

import pytest
from django.contrib.auth import get_user_model
from django.db import connections

from databases.models import Database, DeployRequest
from jobs.models import Claim, Run, Schedule
from tests.engines import ON_ITS_OWN, Engine, PostgreSQL, SQLite, password_of
from tests.recovery.conftest import Stack
from tests.recovery.traps import Trap

CHANGE = "CREATE TABLE visits (id integer); INSERT INTO orders VALUES (7, 'a visit', 0, NULL)"


@pytest.fixture(params=ON_ITS_OWN)
def engine(request: pytest.FixtureRequest, tmp_path: Path, settings) -> Engine:
    settings.DATABASES_FOLDER = tmp_path / "databases"
    if request.param == "sqlite":
        return Engine(SQLite(settings.DATABASES_FOLDER))
    return Engine(PostgreSQL(request.getfixturevalue("postgres")))


@pytest.fixture
def make(engine: Engine, stack: Stack) -> Callable[..., Database]:
    owner = get_user_model().objects.create_user("ada")

    def make(name: str, state: str = Database.State.READY, **fields: object) -> Database:
        if state == Database.State.READY:
            engine.fill(name)
        return Database.objects.create(
            name=name, owner=owner, engine=engine.name, state=state, password=password_of(name), **fields
        )

    return make


@pytest.fixture
def work(stack: Stack, settings) -> Callable[[Trap], None]:
    """Start everything with this trap, and wait until worker and child have been struck."""

    def work(trap: Trap) -> None:
        names = ("schedule_branches", "schedule_deploys")
        Schedule.objects.filter(name__in=names).update(cron="* * * * * */2")
        names = ("DATABASES_FOLDER", "DATABASES_POSTGRES_URL", "DATABASES_POSTGRES_BIN")
        environment = {name: str(getattr(settings, name)) for name in names}
        connections.close_all()
        stack.scheduler()
        stack.worker(trap=trap, **environment)
        stack.wait_until_sprung(trap)

    return work


def runs(job: str) -> list[str]:
    return list(Run.objects.filter(job=job).order_by("pk").values_list("outcome", flat=True))


def test_a_branch(stack: Stack, engine: Engine, make, work) -> None:
    """The copy is there, and nobody has been told."""
    parent = make("shop")
    branch = make("branch", Database.State.PENDING, origin=Database.Origin.COPY, parent=parent)
    work(Trap("before", "databases.models.Database.become_ready", with_parent=True))
    assert Database.objects.get(pk=branch.pk).state == Database.State.PENDING
    made = engine.everything()
    ready = Database.objects.filter(pk=branch.pk, state=Database.State.READY)
    stack.wait_for(lambda: ready.exists() and not Claim.objects.exists(), "the branch is ready")
    assert runs("create_branch") == ["crashed", "done"]
    assert engine.everything() == made
    assert engine.ask("branch", "SELECT count(*) FROM orders") == [(3,)]


def test_a_deploy(stack: Stack, engine: Engine, make, work) -> None:
    """The change is made in both databases, and nobody has been told."""
    branch, target = make("branch"), make("shop")
    request = DeployRequest.objects.create(branch=branch, target=target, sql=CHANGE, requested_by=target.owner)
    work(Trap("before", "databases.models.DeployRequest.become_deployed", with_parent=True))
    assert DeployRequest.objects.get(pk=request.pk).state == DeployRequest.State.DEPLOYING
    assert engine.has("shop", "visits")
    confirmed = DeployRequest.objects.filter(pk=request.pk, state="deployed", confirmed_at__isnull=False)
    stack.wait_for(lambda: confirmed.exists() and not Claim.objects.exists(), "the deploy is made and confirmed")
    assert runs("deploy") == ["crashed", "done"]
    for name in ("branch", "shop"):
        assert engine.ask(name, "SELECT count(*) FROM orders WHERE id = 7") == [(1,)]
        assert engine.ask(name, "SELECT count(*) FROM selfheal_deploys WHERE marker <> 'filled'") == [(1,)]
