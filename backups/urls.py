"""For `path("", include("backups.urls"))`: the console's pages about backups."""

from django.urls import path

from backups import views

urlpatterns = [
    path("databases/<slug:name>/backups/", views.backups, name="backups"),
    path("databases/<slug:name>/backups/policy/", views.new_policy, name="new_policy"),
    path("policies/<int:pk>/", views.policy, name="policy"),
    path("backups/<int:pk>/", views.backup, name="backup"),
    path("backups/<int:pk>/download/", views.download, name="download"),
    path("backups/<int:pk>/restore/", views.restore, name="restore"),
    path("backups/<int:pk>/delete/", views.delete_backup, name="delete_backup"),
]
