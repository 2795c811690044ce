"""The three addresses of the page, in a project that has just been made."""

import pytest


@pytest.mark.django_db(transaction=True)
def test_what_machines_ask_is_answered(client):
    assert client.get("/healthz").status_code == 200
    # Nobody has started a worker.
    response = client.get("/readyz")
    assert response.status_code == 503
    assert response.json()["database"] == "answers"
    assert "background" in response.json()["queues_without_worker"]
    assert b"selfheal_database_up 1.0" in client.get("/metrics").content
