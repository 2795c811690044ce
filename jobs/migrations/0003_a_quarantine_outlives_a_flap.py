from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("selfheal", "0002_what_operators_see_and_steer")]

    operations = [
        migrations.AddField(
            model_name="claim",
            name="unmatched_since",
            field=models.DateTimeField(null=True, verbose_name="does not match since"),
        ),
    ]
