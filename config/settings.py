"""Django's settings for this project, steered by the environment.

Nothing needs to be set on a developer's machine. `ALLOWED_HOSTS` is what makes this a deployment: once it is set,
`DEBUG` is off unless asked for, and `SECRET_KEY` has to be set.
"""

import os
from datetime import timedelta
from pathlib import Path

import dj_database_url
from django.core.exceptions import ImproperlyConfigured

from config import BASE_DIR, HOME

HOME.mkdir(mode=0o700, parents=True, exist_ok=True)

ALLOWED_HOSTS = [host.strip() for host in os.environ.get("ALLOWED_HOSTS", "").split(",") if host.strip()]
DEBUG = os.environ.get("DEBUG", "" if ALLOWED_HOSTS else "1").lower() in {"1", "true", "yes", "on"}
SECRET_KEY = os.environ.get("SECRET_KEY", "for-a-developer's-machine-only" if DEBUG else "")
if not SECRET_KEY:
    raise ImproperlyConfigured(
        "SECRET_KEY is not set, and DEBUG is off. Set the environment variable SECRET_KEY to a long random string "
        "that nobody else knows; `python -c 'import secrets; print(secrets.token_urlsafe(50))'` prints one."
    )
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = not DEBUG

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django_rq",
    "waffle",
    "jobs",
    "databases",
    "backups",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]
ROOT_URLCONF = "config.urls"
WSGI_APPLICATION = "config.wsgi.application"

DATABASES = {
    "default": dj_database_url.parse(os.environ.get("DATABASE_URL") or f"sqlite:///{HOME / 'db.sqlite3'}"),
}
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    DATABASES["default"]["OPTIONS"] = {
        # Many processes write: a transaction that begins as a reader and then writes would fail instead of waiting.
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        "init_command": "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;",
    }
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{validator}"}
    for validator in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]

LANGUAGE_CODE = "en-us"
TIME_ZONE = "UTC"
USE_TZ = True

STATIC_URL = "static/"
STATICFILES_DIRS = [BASE_DIR / "static"]
STATIC_ROOT = HOME / "static"

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "{asctime} {levelname} {name}: {message}", "style": "{"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {name: {"handlers": ["console"], "level": "INFO"} for name in ("selfheal", "databases", "backups")},
}

# The queue: a hint. Losing all of it loses nothing.
REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379/0")
RQ_QUEUES = {name: {"URL": REDIS_URL} for name in ("urgent", "default", "background")}
RQ = {
    "JOB_CLASS": "jobs.message.Message",
    "QUEUE_CLASS": "jobs.queues.Queue",
    "WORKER_CLASS": "jobs.worker.Worker",
    "SCHEDULER_CLASS": "jobs.scheduler.Scheduler",
}
# django-rq's own pages let every staff user act, write no log, and fail while Redis is away.
RQ_SHOW_ADMIN_LINK = False
JOBS = {
    "LEASE": timedelta(seconds=60),
    "HEARTBEAT": timedelta(seconds=15),
    "TICK": timedelta(seconds=5),
    "REDIS_TIMEOUT": timedelta(milliseconds=500),
    "KEEP_RUNS": timedelta(days=14),
}

# Where the `databases` app really creates databases, and by what.
DATABASES_FOLDER = Path(os.environ.get("DATABASES_FOLDER", HOME / "databases")).resolve()
DATABASES_POSTGRES_URL = os.environ.get("DATABASES_POSTGRES_URL", "")
DATABASES_PROVISIONERS = {
    "sqlite": os.environ.get("DATABASES_SQLITE_PROVISIONER", "databases.provisioners.sqlite.SQLiteProvisioner"),
    "postgresql": os.environ.get(
        "DATABASES_POSTGRES_PROVISIONER", "databases.provisioners.postgresql.PostgreSQLProvisioner"
    ),
}
# Where PostgreSQL's own programs are, pg_dump and pg_restore; empty: on PATH.
DATABASES_POSTGRES_BIN = os.environ.get("DATABASES_POSTGRES_BIN", "")

# Where backups are kept, and where a job writes what it needs for a while.
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    "backups": {
        "BACKEND": "django.core.files.storage.FileSystemStorage",
        "OPTIONS": {
            "location": os.environ.get("BACKUPS_FOLDER", HOME / "backups"),
            "file_permissions_mode": 0o600,
            "directory_permissions_mode": 0o700,
        },
    },
}
BACKUPS_SCRATCH = Path(os.environ.get("BACKUPS_SCRATCH", HOME / "scratch")).resolve()

LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "databases"
LOGOUT_REDIRECT_URL = "login"
