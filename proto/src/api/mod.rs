//! Requests and answers of the REST API under `/v1`.
