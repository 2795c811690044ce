"""For `path("", include("jobs.urls"))`: what machines ask."""

from django.urls import path

from jobs import views

app_name = "selfheal"
urlpatterns = [
    path("healthz", views.healthz, name="healthz"),
    path("readyz", views.readyz, name="readyz"),
    path("metrics", views.metrics, name="metrics"),
]
