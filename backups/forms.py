"""What people ask for about backups."""

from datetime import timedelta
from typing import Any

from django import forms
from django.core.exceptions import ValidationError
from django.utils import timezone

from backups.models import BackupPolicy
from databases.forms import Plain

UNITS = {"minutes": timedelta(minutes=1), "hours": timedelta(hours=1), "days": timedelta(days=1)}
MOST = 9_999
"""Of any unit."""


class SpanWidget(forms.MultiWidget):
    use_fieldset = True

    def __init__(self, label: str) -> None:
        number = forms.NumberInput({"aria-label": f"{label}, number", "inputmode": "numeric"})
        unit = forms.Select({"aria-label": f"{label}, unit"}, choices=[(unit, unit) for unit in UNITS])
        super().__init__({"number": number, "unit": unit}, {"class": "span"})

    def decompress(self, value: timedelta | None) -> list[Any]:
        if value is None:
            return [None, "hours"]
        unit = next((unit for unit in reversed(UNITS) if value % UNITS[unit] == timedelta(0)), "minutes")
        return [round(value / UNITS[unit]), unit]


class SpanField(forms.MultiValueField):
    """A duration, as a number and its unit."""

    def __init__(self, label: str, **kwargs: Any) -> None:
        number = forms.IntegerField(min_value=0, max_value=MOST, required=False)
        unit = forms.ChoiceField(choices=[(unit, unit) for unit in UNITS], required=False)
        widget = SpanWidget(label)
        super().__init__((number, unit), label=label, widget=widget, require_all_fields=False, **kwargs)

    def compress(self, data_list: list[Any]) -> timedelta | None:
        number, unit = data_list or (None, "")
        if number is None and self.required:
            raise ValidationError(self.error_messages["required"], code="required")
        if number is not None and not unit:
            raise ValidationError("Choose a unit.")
        return None if number is None else number * UNITS[unit]


class PolicyForm(Plain, forms.ModelForm):
    every = SpanField("Every", required=False, help_text="Five minutes or more.")
    keep_for = SpanField("Keep each for", help_text="The last good backup is kept in any case.")

    class Meta:
        model = BackupPolicy
        fields = ["every", "cron", "keep_for", "is_enabled"]
        labels = {"cron": "Or at fixed times (cron)", "is_enabled": "Enabled"}
        help_texts = {"is_enabled": "While it is not, no backups are taken by it; those that there are stay."}
        widgets = {"cron": forms.TextInput({"autocapitalize": "none", "autocomplete": "off", "spellcheck": "false"})}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        zone = timezone.get_current_timezone_name()
        self.fields[
            "cron"
        ].help_text = f"Five fields, such as 15 3 * * * for a quarter past three each night, in {zone}."

    def save(self, commit: bool = True) -> BackupPolicy:
        policy: BackupPolicy = self.instance
        if policy._state.adding:
            policy.begin()
            policy.save()
        else:
            policy.save_edit(self.changed_data)
        return policy
