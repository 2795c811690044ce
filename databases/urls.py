"""For `path("", include("databases.urls"))`: the console's pages about databases and deploys."""

from django.urls import path

from databases import views

urlpatterns = [
    path("", views.databases, name="databases"),
    path("new/", views.new_database, name="new_database"),
    path("databases/<slug:name>/", views.database, name="database"),
    path("databases/<slug:name>/connection/", views.connection, name="connection"),
    path("databases/<slug:name>/branch/", views.new_branch, name="new_branch"),
    path("databases/<slug:name>/delete/", views.delete_database, name="delete_database"),
    path("deploys/", views.deploys, name="deploys"),
    path("deploys/new/", views.new_deploy, name="new_deploy"),
    path("deploys/<int:pk>/", views.deploy, name="deploy"),
    path("deploys/<int:pk>/withdraw/", views.withdraw_deploy, name="withdraw_deploy"),
]
