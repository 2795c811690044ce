"""`manage.py jobs …`: what operators do in the admin, for a terminal, a runbook or a script."""

from __future__ import annotations

import contextlib
import difflib
import getpass
import json
import os
import re
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import close_old_connections
from django.utils import timezone

from jobs import clock, health, operations, pauses, registry
from jobs.exceptions import QueueUnavailable
from jobs.explain import Explanation, explain, said_of_pause
from jobs.job import Job
from jobs.models import Claim, Operation, Run
from jobs.sweep import Sweep, SweepResult

# How often `status --watch` looks, and what makes a terminal forget what it showed before.
WATCH_SECONDS = 2.0
CLEAR = "\x1b[H\x1b[J"
CLEAR_REST_OF_LINE = "\x1b[K"
BAR = 30
"""How many characters wide a sweep's progress is shown."""

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
MARKS = {"fine": "ok", "waiting": "..", "problem": "!!"}
# What an explanation says would mend it, as a command.
REMEDIES: dict[str, Callable[[Explanation], str]] = {
    "queue_now": lambda of: f"retry {of.job} {of.pk}",
    "release": lambda of: f"retry {of.job} {of.pk}",
    "resume": lambda of: f"resume {of.paused[0]}",
    "run_sweep": lambda of: f"sweep {of.sweep}",
}


def duration(text: str) -> timedelta:
    """Read a duration such as 30m, 2h or 1d."""
    if not (found := re.fullmatch(r"(\d{1,6})([smhd])", text)) or not int(found[1]):
        raise ArgumentTypeError(f"{text!r} is no duration: give a number and a unit, such as 30m, 2h or 1d")
    return timedelta(**{UNITS[found[2]]: int(found[1])})


def operator() -> str:
    """Who types: the user of the operating system."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # In a container there may be a number only.
        return f"uid {os.getuid()}"


class Command(BaseCommand):
    help = "Shows and steers background jobs: status, check, sweep, explain, pause, resume, retry, quarantine."

    def add_arguments(self, parser: CommandParser) -> None:
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

        def command(name: str, sentence: str) -> CommandParser:
            added: CommandParser = commands.add_parser(name, help=sentence, description=sentence)
            return added

        status = command("status", "Show how it is going: servers, queues, and every job and sweep.")
        status.add_argument("--json", action="store_true", help="all of it, for a program; with --watch, one a line")
        status.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")

        command("check", "Say what is wrong, and end with exit code 1 if anything is.")

        sweep = command("sweep", "Sweep now, here: queue the job for every row that needs it.")
        sweep.add_argument("name", nargs="?", metavar="NAME", help="of the sweep")
        sweep.add_argument("--all", action="store_true", help="every sweep, one after the other")
        sweep.add_argument("--dry-run", action="store_true", help="only count")

        why = command("explain", "Say why a row is not ready, and what mends it.")
        why.add_argument("name", metavar="JOB")
        why.add_argument("pk", metavar="PK")

        pause = command("pause", "Stop a job or sweep everywhere within seconds. Nothing is lost.")
        pause.add_argument("name", metavar="NAME")
        pause.add_argument("--for", dest="long", type=duration, metavar="30m", help="until it is resumed, if not given")
        pause.add_argument("--reason", default="", help="for whoever wonders why it does not run")

        resume = command("resume", "End a pause, whoever made it.")
        resume.add_argument("name", metavar="NAME")

        retry = command("retry", "Have rows attempted again now: those that back off, and quarantined ones.")
        retry.add_argument("name", metavar="JOB")
        retry.add_argument("pks", nargs="*", metavar="PK")
        retry.add_argument("--all", action="store_true", help="every row of the job that backs off")
        retry.add_argument("--quarantined", action="store_true", help="every row of the job that is quarantined")

        quarantine = command("quarantine", "Set a row aside: the job leaves it alone until it is retried.")
        quarantine.add_argument("name", metavar="JOB")
        quarantine.add_argument("pk", metavar="PK")

    def handle(self, *args: Any, **options: Any) -> None:
        getattr(self, f"_{options['command']}")(options)

    # --- All of it ----------------------------------------------------------------------------------------------------

    def _status(self, options: dict[str, Any]) -> None:
        write = self._write_json if options["json"] else self._write
        if not options["watch"]:
            return write(health.read())
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                found = health.read()
                if self.stdout.isatty() and not options["json"]:
                    self.stdout.write(CLEAR, ending="")
                write(found)
                self.stdout.flush()
                # Each look is a fresh one, also when the database was restarted meanwhile.
                close_old_connections()
                time.sleep(WATCH_SECONDS)

    def _check(self, options: dict[str, Any]) -> None:
        found = health.read()
        self._write_problems(found)
        if not found.is_well:
            raise CommandError("All is not well.")

    def _write_json(self, found: health.Health) -> None:
        self.stdout.write(json.dumps(found.as_dict()))

    def _write(self, found: health.Health) -> None:
        self._write_problems(found)
        servers = [f"{each.name} {each.trouble or 'answers'}" for each in (found.database, *found.redis)]
        ticked = f"last tick {_ago(found.ticking.last_tick_at, found.at)}"
        self.stdout.write("; ".join([*servers, ticked if found.ticking.is_alive else f"NOBODY TICKS, {ticked}"]))
        self.stdout.write()
        queues = [[each.name, _or_unknown(each.depth), _or_unknown(each.workers)] for each in found.queues]
        self._write_table(["QUEUE", "WAITING", "WORKERS"], queues)
        self.stdout.write()
        items = [
            [
                each.name,
                each.kind,
                each.state,
                *map(str, (each.leased, each.due, each.backing_off, each.quarantined)),
                str(each.outcomes.get(Run.Outcome.DONE, 0)),
                str(each.failures),
                _ago(each.last_succeeded_at, found.at) if each.cron else "",
            ]
            for each in found.items
        ]
        titles = [
            "NAME",
            "KIND",
            "STATE",
            "AT WORK",
            "DUE",
            "BACKING OFF",
            "QUARANTINED",
            "DONE/H",
            "FAILED/H",
            "LAST SUCCESS",
        ]
        self._write_table(titles, items)

    def _write_problems(self, found: health.Health) -> None:
        style = {"critical": self.style.ERROR, "warning": self.style.WARNING, "notice": self.style.NOTICE}
        for problem in found.problems:
            self.stdout.write(f"{style[problem.severity](problem.severity):8}  {problem}")
        if not found.problems:
            self.stdout.write(self.style.SUCCESS("All is well."))

    def _write_table(self, titles: list[str], rows: list[list[str]]) -> None:
        widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
        for row in (titles, *rows):
            cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
            self.stdout.write("  ".join(cells).rstrip())

    # --- Sweeps -------------------------------------------------------------------------------------------------------

    def _sweep(self, options: dict[str, Any]) -> None:
        if options["all"] == bool(options["name"]):
            raise CommandError("Name one sweep, or pass --all.")
        found = [each for each in registry.declared() if isinstance(each, Sweep)]
        sweeps = found if options["all"] else [self._sweep_named(options["name"])]
        width = max((len(each.name) for each in sweeps), default=0)
        failed = 0
        for number, each in enumerate(sweeps, 1):
            place = f"[{number}/{len(sweeps)}] " if len(sweeps) > 1 else ""
            head = f"{place}{each.name:{width}}  "
            self.stdout.write(head, ending="")
            self.stdout.flush()
            try:
                self.stdout.write(self._swept(each, options["dry_run"], head))
            except QueueUnavailable as error:
                failed += 1
                self.stdout.write(self.style.ERROR(str(error)))
        if failed:
            raise CommandError(f"{failed} of {len(sweeps)} could not be swept.")

    def _swept(self, sweep: Sweep, dry_run: bool, head: str) -> str:
        if not dry_run and (paused := pauses.read(sweep.switches)):
            return self.style.WARNING(" ".join(map(said_of_pause, paused.values())))
        if self.stdout.isatty():
            try:
                result = sweep.sweep(dry_run=dry_run, on_batch=self._bar(head, sweep))
            finally:
                self.stdout.write(CLEAR_REST_OF_LINE, ending="")
        else:
            result = sweep.sweep(dry_run=dry_run)
        would = "would be enqueued" if dry_run else "enqueued"
        return (
            f"{result.matched} matched: {result.enqueued} {would}, {result.already_queued} queued already, "
            f"{result.waiting} waiting"
        )

    def _bar(self, head: str, sweep: Sweep) -> Callable[[SweepResult], None]:
        """Return what draws a sweep's progress behind the head of its line; what is written next replaces it."""
        # No further than the sweep reads, however long the backlog.
        most = max(1, sweep.queryset().order_by()[: sweep.effective_limit()].count())

        def draw(found: SweepResult) -> None:
            done = min(BAR, found.matched * BAR // most)
            drawn = f"{'#' * done}{'.' * (BAR - done)}  {found.matched} of {max(most, found.matched)}"
            self.stdout.write(f"\r{head}{drawn}{CLEAR_REST_OF_LINE}\r{head}", ending="")
            self.stdout.flush()

        return draw

    # --- Rows ---------------------------------------------------------------------------------------------------------

    def _explain(self, options: dict[str, Any]) -> None:
        job = self._job_named(options["name"])
        explanation = explain(job, self._pk(job, options["pk"]))
        style = {"fine": self.style.SUCCESS, "waiting": self.style.WARNING, "problem": self.style.ERROR}
        self.stdout.write(style[explanation.verdict.state](explanation.verdict.sentence))
        self.stdout.write()
        for step in explanation.steps:
            self.stdout.write(f"{style[step.state](MARKS[step.state])}  {step.title:9} {step.found}")
        if explanation.runs:
            self.stdout.write()
        for run in explanation.runs:
            ended = timezone.localtime(run.finished_at) if timezone.is_aware(run.finished_at) else run.finished_at
            error = run.error.partition("\n")[0][:200]
            self.stdout.write(f"{ended:%Y-%m-%d %H:%M:%S %Z}  {run.outcome:11} {run.took:>9}  {error}".rstrip())
        if remedy := explanation.verdict.remedy:
            self.stdout.write(f"\nTo mend it: manage.py jobs {REMEDIES[remedy](explanation)}")

    def _retry(self, options: dict[str, Any]) -> None:
        name = options["name"]
        meant = [action for action in ("all", "quarantined") if options[action]]
        if bool(options["pks"]) == bool(meant):
            raise CommandError("Give primary keys, or --all, --quarantined or both.")
        if meant:
            # There may be claims of a job that is gone.
            if not Claim.objects.filter(job=name).exists():
                self._job_named(name)
            criteria = {"all": ("queue_now", "waiting"), "quarantined": ("release", "quarantined")}
            for each in meant:
                action, state = criteria[each]
                self.stdout.write(self._to_all(action, {"job": name, "state": state}))
            return
        job = self._job_named(name)
        self._tell({pk: self._retry_one(job, pk) for pk in options["pks"]})

    def _retry_one(self, job: Job, pk: str) -> operations.Result:
        text = self._pk(job, pk)
        released = operations.apply_to_row("release", job, text)
        return released if released.changed else operations.apply_to_row("queue_now", job, text)

    def _to_all(self, action: str, criteria: dict[str, str]) -> str:
        pks = list(Claim.objects.matching(**criteria).values_list("pk", flat=True)[: operations.AT_ONCE + 1])
        if len(pks) > operations.AT_ONCE:
            operation = operations.request(action, criteria, by=operator())
            return (
                f"{operation.total} rows are {criteria['state']}: done in the background, as operation {operation.pk}."
            )
        changed = operations.apply(action, Claim.objects.filter(pk__in=pks))
        operations.push(changed)
        removed = sum(claim.is_left_behind for claim in changed)
        said = f"{len(changed) - removed} of {len(pks)} that were {criteria['state']} may be attempted again now."
        return f"{said} {removed} that no job works off any more are removed." if removed else said

    def _quarantine(self, options: dict[str, Any]) -> None:
        job = self._job_named(options["name"])
        pk = self._pk(job, options["pk"])
        self._tell({pk: operations.apply_to_row(Operation.Action.QUARANTINE, job, pk, by=operator())})

    def _tell(self, results: dict[str, operations.Result]) -> None:
        for pk, result in results.items():
            style = self.style.SUCCESS if result.changed else self.style.WARNING
            self.stdout.write(f"{pk}: {style(result.sentence)}")
        if left := [pk for pk, result in results.items() if not result.changed]:
            raise CommandError(f"Nothing was done to {len(left)} of {len(results)}: {', '.join(left[:20])}.")

    # --- Pauses -------------------------------------------------------------------------------------------------------

    def _pause(self, options: dict[str, Any]) -> None:
        name = self._named(options["name"])
        until = clock.read() + options["long"] if options["long"] else None
        try:
            pauses.pause(name, reason=options["reason"], until=until, by=operator())
        except ValueError as error:
            raise CommandError(str(error)) from None
        self.stdout.write(said_of_pause(pauses.read([name])[name]))

    def _resume(self, options: dict[str, Any]) -> None:
        name = self._named(options["name"])
        try:
            was_paused = pauses.resume(name)
        except ValueError as error:
            raise CommandError(str(error)) from None
        self.stdout.write(f"{name} is resumed." if was_paused else f"{name} was not paused.")

    # --- Names --------------------------------------------------------------------------------------------------------

    def _named(self, name: str) -> str:
        if registry.get(name) is None:
            raise CommandError(_unknown(name, "job or sweep", [each.name for each in registry.declared()]))
        return name

    def _job_named(self, name: str) -> Job:
        swept = {each.name: each for each in registry.declared() if isinstance(each, Job) and each.is_swept}
        if name not in swept:
            declared = registry.get(name)
            if isinstance(declared, Sweep):
                raise CommandError(f"{name} is a sweep. The job that it feeds is {declared.job.name}.")
            if declared is not None:
                raise CommandError(f"{name} works on no rows: no sweep feeds it.")
            raise CommandError(_unknown(name, "job that a sweep feeds", list(swept)))
        return swept[name]

    def _sweep_named(self, name: str) -> Sweep:
        declared = registry.get(name)
        if isinstance(declared, Sweep):
            return declared
        if isinstance(declared, Job):
            fed = f" Its sweep is {declared.sweep.name}." if declared.sweep else ""
            raise CommandError(f"{name} is a job.{fed}")
        raise CommandError(_unknown(name, "sweep", list(_sweep_names())))

    def _pk(self, job: Job, pk: str) -> str:
        try:
            return job.identify(pk)[0]
        except ValueError as error:
            raise CommandError(str(error)) from None


def _or_unknown(number: int | None) -> str:
    return "?" if number is None else str(number)


def _ago(moment: datetime | None, now: datetime) -> str:
    if moment is None:
        return "never"
    # In whole seconds, and as 0:00:41.
    return f"{timedelta(seconds=max(0, round((now - moment).total_seconds())))} ago"


def _sweep_names() -> Iterator[str]:
    return (each.name for each in registry.declared() if isinstance(each, Sweep))


def _unknown(name: str, kind: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"No {kind} named {name!r} is declared." + (f" Did you mean {near[0]!r}?" if near else "")
