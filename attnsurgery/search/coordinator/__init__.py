"""The process that decides: asks for candidates, hands out work, keeps the study, confirms the winner."""
