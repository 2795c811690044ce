"""The project's URLs: the console, the admin, and what machines ask."""

from django.contrib import admin
from django.contrib.auth.views import LoginView, LogoutView
from django.urls import include, path

from databases.forms import LoginForm

urlpatterns = [
    path("admin/", admin.site.urls),
    path("login/", LoginView.as_view(authentication_form=LoginForm, redirect_authenticated_user=True), name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("", include("jobs.urls")),
    path("", include("databases.urls")),
    path("", include("backups.urls")),
]
