//! Divides documents among processes. A document is answered whole by one process, so its windows are added in the order of a
//! single process.

use std::cmp::Reverse;

use dsmoe_datasets::tasks::Request;
use dsmoe_kernels::comm::{self, What};

use super::{Answer, Answers, Journal, Ran, Responder};
use crate::error::Result;
use crate::ranks::from_first;

/// Documents that a process answers between two exchanges. An interrupt loses at most so many of each.
const ROUND: usize = 64;

const ANSWERS: What = What::of("answers");

/// Answers `documents` as [`Responder::answer`] does. `journal` is that of the first process.
pub(super) fn answer(
    responder: &Responder<'_>,
    documents: &[&[Request]],
    mut journal: Option<&mut Journal>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Option<Answers>> {
    let comm = responder.comm;
    let (mut answers, mut ran) = known(responder, documents, journal.as_deref())?;
    let mut open: Vec<usize> = (0..documents.len()).filter(|&i| answers[i].is_none()).collect();
    // Documents of similar length share a round, as they share a forward pass.
    open.sort_by_key(|&i| (Reverse(documents[i].iter().map(size).sum::<usize>()), i));
    let mut finished = documents.len() - open.len();
    progress(finished, documents.len());
    for round in open.chunks(ROUND * comm.size()) {
        let of_rank = |rank: usize| round.iter().copied().skip(rank).step_by(comm.size());
        let own: Vec<&[Request]> = of_rank(comm.rank()).map(|i| documents[i]).collect();
        let mut shown =
            |done: usize, _| progress(finished + (done * comm.size()).min(round.len()), documents.len());
        let found = responder.answer_alone(&own, None, &mut shown)?;
        let message = serde_json::to_vec(&found).expect("answers are JSON");
        for (rank, message) in comm::gather(comm, ANSWERS, &message)?.iter().enumerate() {
            let found: Option<Answers> = serde_json::from_slice(message).expect("the answers of a process");
            let Some(found) = found else { return Ok(None) };
            for (i, found) in of_rank(rank).zip(found.documents) {
                answers[i] = Some(found);
            }
            if let Some(journal) = journal.as_deref_mut() {
                let pairs = of_rank(rank).flat_map(|i| documents[i].iter().zip(answers[i].iter().flatten()));
                let answered = pairs.filter_map(|(request, answer)| Some((request, answer.as_ref().ok()?)));
                journal.put(answered, found.ran.clone())?;
            }
            ran.add(&found.ran);
        }
        finished += round.len();
        progress(finished, documents.len());
    }
    let documents = answers.into_iter().map(Option::unwrap_or_default).collect();
    Ok(Some(Answers { documents, ran }))
}

/// Returns the answers in the journal of the first process, where a document has all, and the work for them.
fn known(
    responder: &Responder<'_>,
    documents: &[&[Request]],
    journal: Option<&Journal>,
) -> Result<(Vec<Option<Vec<Answer>>>, Ran)> {
    let of_document = |requests: &&[Request]| -> Option<Vec<Answer>> {
        requests.iter().map(|request| Some(Ok(journal?.get(request)?.clone()))).collect()
    };
    let answers: Vec<Option<Vec<Answer>>> = documents.iter().map(of_document).collect();
    let ran = journal.map(|journal| journal.ran().clone()).unwrap_or_default();
    let message = serde_json::to_string(&(answers, ran)).expect("answers are JSON");
    let first = from_first(responder.comm, ANSWERS, &message)?;
    Ok(serde_json::from_str(&first).expect("the answers of the first process"))
}

/// Returns the bytes of the text of a request.
fn size(request: &Request) -> usize {
    match request {
        Request::LogLikelihood { context, continuation } => context.len() + continuation.len(),
        Request::Rolling { text } => text.len(),
        Request::Generate { context, .. } => context.len(),
    }
}
