//! Encodes the texts of requests as lm-evaluation-harness does.

use dsmoe_datasets::tasks::{Profile, strip_end};
use dsmoe_datasets::{Bos, Tokenizer};

use crate::error::Result;

/// The reason why a request has no response. It is about the document, not about the run.
pub(crate) type Refusal = String;

/// A request that is ready to be answered, or the reason that it cannot be.
pub(crate) type Encoded<T> = std::result::Result<T, Refusal>;

/// Encodes texts for a model.
#[derive(Clone, Copy)]
pub(crate) struct Encoder<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) bos: Bos,
    pub(crate) profile: Profile,
    /// The token from which a text without context starts.
    pub(crate) start: Option<u32>,
    /// Positions of the model.
    pub(crate) positions: usize,
}

/// Tokens to run, and those to score after them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Scored {
    /// The inputs of the model.
    pub(crate) inputs: Vec<u32>,
    /// The tokens after the last inputs, one for each.
    pub(crate) targets: Vec<u32>,
}

impl Encoder<'_> {
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text, self.bos)?)
    }

    /// Encodes a context by itself. The white space at its end belongs to what follows it and is returned too.
    pub(crate) fn context<'t>(&self, context: &'t str) -> Result<(Vec<u32>, &'t str, &'t str)> {
        if context.is_empty() {
            return Ok((self.start.into_iter().collect(), "", ""));
        }
        let text = if self.profile.encodes_apart() { context } else { strip_end(context) };
        Ok((self.encode(text)?, text, &context[text.len()..]))
    }

    /// Encodes a continuation after a context encoded by [`Encoder::context`].
    pub(crate) fn pair(
        &self,
        (context, text, space): &(Vec<u32>, &str, &str),
        continuation: &str,
    ) -> Result<Encoded<Scored>> {
        let mut context = context.clone();
        let targets = if text.is_empty() && space.is_empty() {
            let mut targets = self.tokenizer.encode(continuation, Bos::Never)?;
            // A continuation that brings its own start takes the place of the start.
            if targets.first() == context.first() && !targets.is_empty() {
                context = vec![targets.remove(0)];
            }
            targets
        } else if self.profile.encodes_apart() {
            self.tokenizer.encode(continuation, Bos::Never)?
        } else {
            let whole = self.encode(&format!("{text}{space}{continuation}"))?;
            // A tokenizer whose pieces end in a word mark makes other tokens of the context here; the harness keeps
            // those of the context alone.
            whole.get(context.len()..).unwrap_or_default().to_vec()
        };
        Ok(self.scored(context, targets))
    }

    /// Keeps the last tokens that the model has positions for.
    pub(crate) fn scored(&self, context: Vec<u32>, targets: Vec<u32>) -> Encoded<Scored> {
        if context.is_empty() {
            return Err("nothing stands before the continuation; set the BOS rule to always".into());
        }
        if targets.is_empty() {
            return Err("the continuation has no token of its own with this tokenizer".into());
        }
        if targets.len() > self.positions {
            let (tokens, positions) = (targets.len(), self.positions);
            return Err(format!("a continuation of {tokens} tokens for a model of {positions} positions"));
        }
        let mut inputs = context;
        inputs.extend_from_slice(&targets[..targets.len() - 1]);
        inputs.drain(..inputs.len().saturating_sub(self.positions));
        Ok(Scored { inputs, targets })
    }

    /// Cuts a text into windows that do not overlap, each as long as the model. The first follows the start token; the
    /// last has as much context as fits.
    pub(crate) fn rolling(&self, text: &str) -> Result<Encoded<Vec<Scored>>> {
        let Some(start) = self.start else {
            return Ok(Err("the model names no token to start a text from".into()));
        };
        let tokens = self.encode(text)?;
        let whole = [&[start][..], &tokens].concat();
        let mut windows = Vec::new();
        let mut done = 0;
        while done < tokens.len() {
            let end = tokens.len().min(done + self.positions);
            let first = end.saturating_sub(self.positions);
            windows.push(Scored { inputs: whole[first..end].to_vec(), targets: tokens[done..end].to_vec() });
            done = end;
        }
        Ok(Ok(windows))
    }

    /// Encodes a prompt that leaves room for `max_tokens` new ones.
    pub(crate) fn prompt(&self, context: &str, max_tokens: usize) -> Result<Encoded<Vec<u32>>> {
        let Some(room) = self.positions.checked_sub(max_tokens).filter(|&room| room > 0) else {
            let what =
                format!("an answer of {max_tokens} tokens for a model of {} positions", self.positions);
            return Ok(Err(format!("{what}; allow fewer new tokens")));
        };
        let mut tokens = self.encode(context)?;
        tokens.drain(..tokens.len().saturating_sub(room));
        if tokens.is_empty() {
            return Ok(Err("the prompt is empty; set the BOS rule to always".into()));
        }
        Ok(Ok(tokens))
    }
}
