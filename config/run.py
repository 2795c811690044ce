"""`python -m config.run`: the whole stack on this machine for a person, until Ctrl-C."""

import argparse
import os
import secrets
import socket
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import django

from config import HOME
from config.servers import PostgresServer, RedisServer, Server, ServerError, postgres_binary, running_redis
from config.stack import StackError, Supervisor, interrupt_on_sigterm, job_commands, manage

HOST = "127.0.0.1"
ADMIN = "admin"
START_SECONDS = 30


def main() -> None:
    """Run until Ctrl-C or SIGTERM, and leave no process behind."""
    port = parse_port()
    interrupt_on_sigterm()
    try:
        run(port)
    except (ServerError, StackError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("\nStopped; no process is left.")


def parse_port() -> int:
    parser = argparse.ArgumentParser(prog="config.run", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="of the web server; 8000 unless you say otherwise")
    port: int = parser.parse_args().port
    return port


def run(port: int) -> None:
    own_redis = None
    if not (redis_url := running_redis()):
        own_redis = RedisServer(HOME / "redis")
        redis_url = own_redis.url
    # Read by the settings, here and in every process of the stack.
    os.environ["REDIS_URL"] = redis_url
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

    with Supervisor(HOME) as stack, ExitStack() as servers:
        # Only now: a web server that a killed run left behind has been ended.
        refuse_taken(port)
        if own_redis:
            servers.enter_context(own_redis)
        own_postgres = None
        if not os.environ.get("DATABASES_POSTGRES_URL"):
            own_postgres = servers.enter_context(postgres_for_users(HOME))
            os.environ["DATABASES_POSTGRES_URL"] = own_postgres.url
            os.environ["DATABASES_POSTGRES_BIN"] = str(postgres_binary("pg_dump").parent)
        print(f"Redis     {redis_url} ({'started for this run' if own_redis else 'found running'})")
        password = prepare_database(HOME / "admin-password")
        print(f"Database  {describe_database()}")

        own_servers: list[Server] = [server for server in (own_redis, own_postgres) if server]
        for name, argv in {**job_commands(), "web": manage("runserver", "--noreload", f"{HOST}:{port}")}.items():
            stack.start(name, argv)
        wait_for_web(stack, port)
        print(f"Running   {', '.join(stack.names)}; their output is in {stack.logs}")
        print(f"Console   http://{HOST}:{port}/         user {ADMIN}, password {password}")
        print(f"Admin     http://{HOST}:{port}/admin/   the same")
        print("Ctrl-C ends all of it.", flush=True)

        while True:
            for death in stack.poll():
                print(f"{death.name} (process {death.pid}) ended with code {death.code}; it is replaced.", flush=True)
            for server in own_servers:
                if not server.pid:
                    print(f"{server.name} died; it is started again.", flush=True)
                    server.start()
            time.sleep(0.5)


def postgres_for_users(home: Path) -> PostgresServer:
    """Where the users' databases of that engine are made: on the same port at each run, by which they are known."""
    remembered = home / "postgres-port"
    server = PostgresServer(home / "postgres", int(remembered.read_text()) if remembered.exists() else None)
    remembered.write_text(str(server.port))
    return server


def refuse_taken(port: int) -> None:
    with closing(socket.socket()) as probe:
        # As the web server does: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise StackError(
                f'Port {port} cannot be used ({error}). Choose another: make run ARGS="--port {port % 60000 + 1}"'
            ) from None


def prepare_database(password_file: Path) -> str:
    """Migrate, see that there is an admin, and return what to say of the admin's password: the same at each run."""
    django.setup()
    from django.contrib.auth import get_user_model
    from django.core.management import call_command
    from django.db import connections

    call_command("migrate", verbosity=0)
    users = get_user_model().objects
    stored = password_file.read_text().strip() if password_file.exists() else ""
    if (user := users.filter(**{get_user_model().USERNAME_FIELD: ADMIN}).first()) is None:
        stored = stored or secrets.token_urlsafe(12)
        password_file.touch(mode=0o600)
        password_file.write_text(f"{stored}\n")
        users.create_superuser(ADMIN, password=stored)
    elif not user.check_password(stored):
        stored = "as you set it"
    connections.close_all()
    return stored


def describe_database() -> str:
    from django.db import connection

    return f"{connection.vendor}, {connection.settings_dict['NAME']}"


def wait_for_web(stack: Supervisor, port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with closing(socket.socket()) as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        if any(death.name == "web" for death in stack.poll()):
            break
        time.sleep(0.1)
    raise StackError(f"The web server did not start. See why in {stack.logs / 'web.log'}.")


if __name__ == "__main__":
    main()
