from django.apps import AppConfig


class CastConfig(AppConfig):
    name = "tests.cast"
    label = "cast"
    default_auto_field = "django.db.models.BigAutoField"
