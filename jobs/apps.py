from django.apps import AppConfig
from django.db.models.signals import post_migrate
from django.utils.translation import gettext_lazy as _


class JobsConfig(AppConfig):
    """Imports every app's jobs.py at start, and keeps schedules and switches in step with it after `migrate`."""

    name = "jobs"
    # People already have apps labelled "jobs", and a label cannot change later.
    label = "selfheal"
    verbose_name = _("Jobs")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from jobs import checks, registry, scheduler  # noqa: F401  (checks register themselves)

        registry.autodiscover()
        post_migrate.connect(scheduler.on_migrate, sender=self, dispatch_uid="selfheal")
