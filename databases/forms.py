"""What people ask for in the console, and what is wrong with it, in words at its field."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

from django import forms
from django.conf import settings
from django.contrib.auth.forms import AuthenticationForm
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction

from databases.models import Database, DatabaseQuerySet, DeployRequest
from databases.sql import losses

LONGEST_SQL = 100_000
"""In characters."""


class Plain(forms.BaseForm):
    """A form whose labels have no colon."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"label_suffix": "", **kwargs})


class LoginForm(Plain, AuthenticationForm):
    pass


class NameForm(Plain, forms.ModelForm):
    """The name of a new database."""

    class Meta:
        model = Database
        fields = ["name"]
        help_texts = {
            "name": "Lower-case letters, digits and underscores; it begins with a letter. A name is never used twice."
        }
        widgets: ClassVar[dict[str, Any]] = {
            "name": forms.TextInput({"autocapitalize": "none", "autocomplete": "off", "spellcheck": "false"})
        }

    def ask(self, request: Callable[[Database], object]) -> bool:
        """Ask for the database. False, and an error, when it cannot be had any more since this was looked at."""
        try:
            with transaction.atomic():
                request(self.instance)
        except ValidationError as refused:
            self.add_error(None, refused)
        except IntegrityError:
            self.add_error("name", Database._meta.get_field("name").error_messages["unique"])
        return self.is_valid()


class DatabaseForm(NameForm):
    """A new database of its own."""

    class Meta(NameForm.Meta):
        fields = ["name", "engine"]
        widgets = {**NameForm.Meta.widgets, "engine": forms.RadioSelect}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        engine = self.fields["engine"]
        assert isinstance(engine, forms.ChoiceField)
        engine.choices = [
            choice
            for choice in Database.Engine.choices
            if choice[0] != Database.Engine.POSTGRESQL or settings.DATABASES_POSTGRES_URL
        ]


class TypedName(forms.CharField):
    """A name that has to be typed by whoever means it."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        self.name = name
        widget = forms.TextInput({"autocapitalize": "none", "autocomplete": "off", "spellcheck": "false"})
        # It has an error of its own for one that is missing.
        super().__init__(label=f"Type {name} to confirm", required=False, widget=widget, **kwargs)

    def validate(self, value: str) -> None:
        if not value:
            raise ValidationError(f"If you mean it, type {self.name} here.")
        if value != self.name:
            raise ValidationError(f"This is not the name. Type {self.name}, exactly as it is written here.")


class DeletionForm(Plain, forms.Form):
    """The name of what is to be deleted, typed."""

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["typed"] = TypedName(name)


class DatabaseChoice(forms.ModelChoiceField):
    def label_from_instance(self, obj: Any) -> str:
        kind = obj.get_engine_display()
        return f"{obj} ({kind}, branch of {obj.parent})" if obj.parent else f"{obj} ({kind})"


class DeployForm(Plain, forms.ModelForm):
    """A change of a schema. One that destroys something is asked for twice: the second time with the target's name."""

    class Meta:
        model = DeployRequest
        fields = ["branch", "target", "sql"]
        field_classes = {"branch": DatabaseChoice, "target": DatabaseChoice}
        labels = {"branch": "Try it on", "target": "Then deploy it into"}
        help_texts = {
            "branch": "The change stays in this one, whatever becomes of it.",
            "target": "It is changed once, or not at all: the change is one transaction.",
            "sql": "One or more statements, each ended by a semicolon.",
        }
        widgets = {"sql": forms.Textarea({"rows": 10, "spellcheck": "false", "autocapitalize": "none"})}

    def __init__(self, databases: DatabaseQuerySet, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("branch", "target"):
            field = self.fields[name]
            assert isinstance(field, forms.ModelChoiceField)
            field.queryset = databases
            field.error_messages["invalid_choice"] = "Choose one of your databases that is ready."
        self.fields["sql"] = forms.CharField(
            label="SQL",
            max_length=LONGEST_SQL,
            widget=self.fields["sql"].widget,
            help_text=self.fields["sql"].help_text,
        )
        self.losses = losses(self.data.get("sql", "")[:LONGEST_SQL])
        if self.losses:
            # Without a target there is nothing to type yet, and an error at its field.
            with suppress(ValidationError):
                target = self.fields["target"].clean(self.data.get("target"))
                said = f"This change has {', '.join(self.losses)} in it."
                self.fields["typed"] = TypedName(target.name, help_text=said)
