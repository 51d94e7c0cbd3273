//! `cloison audit`: who changed what, and when.

use std::io::{self, Write};

use cloison_proto::api::{AuditEntry, AuditList, MAX_PAGE};

use super::Context;
use crate::args::AuditArgs;
use crate::error::{CliError, Exit};
use crate::render::{list, print, table, utc};

pub(super) async fn run(context: &Context, args: &AuditArgs) -> Result<Exit, CliError> {
    let mut all = AuditList {
        entries: Vec::new(),
        next: Some(args.after),
    };
    let wanted = if args.limit == 0 { u64::MAX } else { args.limit };
    while let Some(after) = all.next {
        let left = wanted.saturating_sub(u64::try_from(all.entries.len()).unwrap_or(u64::MAX));
        if left == 0 {
            break;
        }
        let limit = left.min(MAX_PAGE.into()).to_string();
        let page: AuditList = context
            .client
            .query("audit", &[("after", &after.to_string()), ("limit", &limit)])
            .await?;
        all.entries.extend(page.entries);
        all.next = page.next;
    }
    print(context.output, &all, people)?;
    Ok(Exit::Ok)
}

fn people(out: &mut dyn Write, all: &AuditList) -> io::Result<()> {
    let row = |e: &AuditEntry| {
        vec![
            e.seq.to_string(),
            utc(e.at),
            e.actor.clone(),
            e.action.clone(),
            list(&e.objects),
            e.outcome.clone(),
        ]
    };
    table(
        out,
        &["no", "time", "actor", "action", "objects", "outcome"],
        all.entries.iter().map(row),
    )
}
