-- Each server has a database of its own; MLflow keeps its users apart from its runs.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_auth;
