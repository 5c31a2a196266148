"""How certain a number is. numpy only: importing scipy alone takes longer than most of the work here."""
