from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("selfheal", "0003_every_column_has_a_default_in_the_database")]

    operations = [
        migrations.AddField(
            model_name="claim",
            name="unmatched_since",
            field=models.DateTimeField(null=True, verbose_name="does not match since"),
        ),
    ]
